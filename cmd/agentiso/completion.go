package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
)

// completionLimit bounds what a press of the tab key may wait for the daemon.
const completionLimit = time.Second

// complete asks the daemon for what begins with prefix; a daemon that does not
// answer has nothing to offer.
func (a *app) complete(prefix string, taken []string, ask func(context.Context, *client.Client) []string) []string {
	c, err := a.client()
	if err != nil {
		return nil
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
	defer cancel()
	var fit []string
next:
	for _, s := range ask(ctx, c) {
		word, _, _ := strings.Cut(s, "\t")
		if !strings.HasPrefix(word, prefix) {
			continue
		}
		for _, t := range taken {
			if t == word {
				continue next
			}
		}
		fit = append(fit, clean(s))
	}
	return fit
}

func workspaceNames(ctx context.Context, c *client.Client) []string {
	all, err := c.List(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, w := range all {
		names = append(names, w.Name+"\t"+string(w.State)+", "+w.Image)
	}
	return names
}

// completeWorkspaces offers the names of workspaces not named yet.
func (a *app) completeWorkspaces(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(prefix, args, workspaceNames), cobra.ShellCompDirectiveNoFileComp
}

// completeOneWorkspace offers them for the first argument only.
func (a *app) completeOneWorkspace(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeWorkspaces(cmd, args, prefix)
}

// completeCopy offers workspaces with a colon beside the files of this host,
// which the shell knows.
func (a *app) completeCopy(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 1 || strings.ContainsAny(prefix, "/:") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	names := a.complete(prefix, nil, workspaceNames)
	for i, n := range names {
		word, about, _ := strings.Cut(n, "\t")
		names[i] = word + ":\t" + about
	}
	if len(names) == 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return names, cobra.ShellCompDirectiveNoSpace
}

// completeImages offers the names of images.
func (a *app) completeImages(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(prefix, args, func(ctx context.Context, c *client.Client) []string {
		all, err := c.Images(ctx)
		if err != nil {
			return nil
		}
		var names []string
		for _, i := range all {
			for _, n := range i.Names {
				names = append(names, n+"\t"+i.Source)
			}
		}
		return names
	}), cobra.ShellCompDirectiveNoFileComp
}

// completeKernels offers the names of kernels.
func (a *app) completeKernels(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(prefix, nil, func(ctx context.Context, c *client.Client) []string {
		all, err := c.Kernels(ctx)
		if err != nil {
			return nil
		}
		var names []string
		for _, k := range all {
			names = append(names, k.Name+"\t"+k.Release)
		}
		return names
	}), cobra.ShellCompDirectiveNoFileComp
}
