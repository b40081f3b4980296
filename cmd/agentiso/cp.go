package main

import (
	"context"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

func (a *app) newCp() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp [flags] WORKSPACE:PATH PATH|-\n  agentiso cp [flags] PATH|- WORKSPACE:PATH",
		Short: "Copy files and directories into and out of a workspace",
		Long: `Cp copies between this host and a running workspace, with modes and
modification times. Paths inside that are not absolute begin at the user's
home. Whether what is copied lands in a directory or gets its name is decided
as by "docker cp":

  FILE to a directory, or to a name with a final slash    into it
  FILE to anything else                                   to that name
  DIR  to a directory                                     into it, as DIRECTORY/DIR
  DIR  to what does not exist                             to that name
  DIR/. to a directory                                    its contents into it

Missing parents are made. A symbolic link named on the command line is
followed; those inside a directory stay links. Sockets, FIFOs and devices are
left out. Inside, copies belong to the user (see --user); here, to you, without
set-user-id bits.

With - as the local side, a file's contents pass through standard input or
output; a directory passes as a tar stream: out of a directory, or into a
directory that exists or is named with a final slash.`,
		Example: `  agentiso cp app.py box:/srv/
  agentiso cp box:/var/log ./logs
  agentiso cp src/. box:work
  echo hello | agentiso cp - box:/tmp/greeting
  agentiso cp box:/etc - | tar -t
  agentiso cp a:/data - | agentiso cp - b:/data/`,
		Args: nargs(2, 2, "a source and a destination"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			from, to := parseLocation(args[0]), parseLocation(args[1])
			switch {
			case from.ref == "" && to.ref == "":
				return fault.New(fault.Invalid, "neither %s nor %s is in a workspace", args[0], args[1]).
					WithNext("Write WORKSPACE:PATH for one of them.")
			case from.ref != "" && to.ref != "":
				return fault.New(fault.Unsupported, "both %s and %s are in workspaces", args[0], args[1]).
					WithNext("Copy through this host: agentiso cp %s - | agentiso cp - %s", args[0], args[1])
			case to.ref != "":
				return a.copyIn(ctx, c, from.path, to, user)
			}
			return a.copyOut(ctx, c, from, to.path, user)
		}),
		ValidArgsFunction: a.completeCopy,
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "copy as this `user` of the workspace (default: the workspace's)")
	_ = cmd.RegisterFlagCompletionFunc("user", cobra.NoFileCompletions)
	return cmd
}

// location is one side of a copy; ref is "" for this host.
type location struct{ ref, path string }

// parseLocation takes WORKSPACE:PATH apart. What begins with a slash or a dot,
// or has a slash before its colon, is a path of this host.
func parseLocation(s string) location {
	ref, path, ok := strings.Cut(s, ":")
	if !ok || ref == "" || s[0] == '/' || s[0] == '.' || strings.Contains(ref, "/") {
		return location{path: s}
	}
	if path == "" {
		path = "."
	}
	return location{ref, path}
}

func (a *app) copyIn(ctx context.Context, c *client.Client, local string, to location, user string) error {
	p := a.progress("copying to " + to.ref)
	defer p.stop()
	if local != "-" {
		r, err := c.CopyTo(ctx, to.ref, local, to.path, client.CopyOptions{User: user, Progress: p.bytes})
		p.stop()
		return a.copied(r, err)
	}
	in := &counted{r: a.stdin, p: p}
	isDir := strings.HasSuffix(to.path, "/")
	if there, err := c.Stat(ctx, to.ref, to.path, user); err == nil {
		isDir = there.Type == client.TypeDirectory
	} else if client.KindOf(err) != client.NotFound {
		return err
	}
	var err error
	if isDir {
		err = c.WriteArchive(ctx, to.ref, to.path, user, in)
	} else {
		err = c.WriteFile(ctx, to.ref, to.path, user, in)
	}
	p.stop()
	return a.copied(client.Copied{Files: 1, Bytes: in.n}, err)
}

func (a *app) copyOut(ctx context.Context, c *client.Client, from location, local, user string) error {
	p := a.progress("copying from " + from.ref)
	defer p.stop()
	if local != "-" {
		r, err := c.CopyFrom(ctx, from.ref, from.path, local, client.CopyOptions{User: user, Progress: p.bytes})
		p.stop()
		return a.copied(r, err)
	}
	there, err := c.Stat(ctx, from.ref, from.path, user)
	if err != nil {
		return err
	}
	var r io.ReadCloser
	if there.Type == client.TypeDirectory {
		r, err = c.ReadArchive(ctx, from.ref, from.path, user)
	} else {
		r, _, err = c.ReadFile(ctx, from.ref, from.path, user)
	}
	if err != nil {
		return err
	}
	defer r.Close()
	if isTerminal(a.stdout) {
		p.stop() // the contents are what is to be seen
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{a.stdout}, &counted{r: r, p: p}, make([]byte, 256<<10))
	return err
}

// copied tells what a copy did. It is silent for people, like cp.
func (a *app) copied(r client.Copied, err error) error {
	for _, s := range r.Skipped {
		a.note("agentiso: %s is neither file, directory nor link: left out", clean(s))
	}
	if err != nil || !a.json {
		return err
	}
	skipped := r.Skipped
	if skipped == nil {
		skipped = []string{}
	}
	return a.emit(struct {
		Files   int64    `json:"files"`
		Bytes   int64    `json:"bytes"`
		Skipped []string `json:"skipped"`
	}{r.Files, r.Bytes, skipped})
}

// counted shows what passes.
type counted struct {
	r io.Reader
	p *progress
	n int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	if n > 0 {
		c.p.bytes(c.n, 0)
	}
	return n, err
}
