package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
)

func (a *app) newCreate() *cobra.Command {
	var m machineFlags
	var quiet bool
	cmd := &cobra.Command{
		Use:   "create [flags]",
		Short: "Make a workspace and start its machine",
		Long: `Create makes a workspace and prints its name once its machine is ready for
commands. It stays until "agentiso destroy".`,
		Example: `  agentiso create
  agentiso create --name box --image dev --cpus 2 --memory 2G --disk 20G
  WS=$(agentiso create -q) && agentiso exec $WS -- uname -a`,
		Args: nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			o, err := m.options()
			if err != nil {
				return err
			}
			p := a.progress("creating a workspace")
			ws, t, err := c.Create(ctx, o)
			p.stop()
			if err != nil {
				return err
			}
			return a.printCreated(ws, t, quiet)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	m.add(a, cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the id and nothing else")
	return cmd
}

func (a *app) printCreated(ws *client.Workspace, t client.Timings, quiet bool) error {
	switch {
	case a.json:
		return a.emit(created{ws, t})
	case quiet:
		fmt.Fprintln(a.stdout, ws.ID)
	default:
		fmt.Fprintln(a.stdout, ws.Name)
		if isTerminal(a.stderr) {
			a.note("%s", timingLine(ws, t))
		}
	}
	return nil
}

func (a *app) newLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List workspaces",
		Example: `  agentiso ls
  agentiso destroy $(agentiso ls -q)
  agentiso ls --json | jq -r 'select(.state == "failed") | .name'`,
		Args: nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			all, err := c.List(ctx)
			if err != nil {
				return err
			}
			return a.printWorkspaces(all, quiet)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	return cmd
}

func (a *app) printWorkspaces(all []*client.Workspace, quiet bool) error {
	if !a.json && !quiet {
		t := newTable(a.stdout, "NAME", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "CREATED")
		for _, w := range all {
			t.row(w.Name, w.ID, stateText(w), w.Image, strconv.Itoa(w.CPUs), formatBytes(w.MemoryMiB<<20),
				formatBytes(w.DiskUsedBytes)+" of "+formatBytes(w.DiskBytes), formatAge(w.CreatedAt))
		}
		return t.flush()
	}
	for _, w := range all {
		if quiet {
			fmt.Fprintln(a.stdout, w.ID)
		} else if err := a.emit(w); err != nil {
			return err
		}
	}
	return nil
}

// stateText is the state, with the reason when it needs one.
func stateText(w *client.Workspace) string {
	if w.State == client.Running && w.Reason != "" {
		return "running, but held: " + w.Reason
	}
	if w.State == client.Failed && w.Reason != "" {
		const limit = 40
		if r := []rune(w.Reason); len(r) > limit {
			return "failed: " + string(r[:limit]) + "…"
		}
		return "failed: " + w.Reason
	}
	return string(w.State)
}

func (a *app) newInfo() *cobra.Command {
	return &cobra.Command{
		Use: "info [WORKSPACE...]", Short: "Show a workspace, or the daemon",
		Example: `  agentiso info box
  agentiso info            # about the daemon
  agentiso info box --json | jq .address`,
		Args: cobra.ArbitraryArgs,
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			if len(args) == 0 {
				i, err := c.Info(ctx)
				if err != nil {
					return err
				}
				return a.printInfo(i)
			}
			return a.each(args, func(ref string) error {
				w, err := c.Get(ctx, ref)
				if err != nil {
					return err
				}
				return a.printWorkspace(w)
			})
		}),
		ValidArgsFunction: a.completeWorkspaces,
	}
}

func (a *app) printInfo(i *client.Info) error {
	if a.json {
		return a.emit(i)
	}
	return describe(a.stdout,
		field{"version", i.Version}, field{"pid", strconv.Itoa(i.PID)}, field{"started", formatAge(i.StartedAt)},
		field{"socket", i.Socket}, field{"data", i.DataDir}, field{"run", i.RunDir}, field{"config", i.ConfigFile},
		field{"storage", i.StorageDriver}, field{"network", i.NetworkDriver},
		field{"qemu", i.QEMUVersion}, field{"accelerator", i.Accelerator},
		field{"image", i.DefaultImage}, field{"kernel", i.DefaultKernel},
		field{"workspaces", fmt.Sprintf("%d running, %d in all, %d at most", i.WorkspacesRunning, i.WorkspacesTotal, i.WorkspacesMax)},
	)
}

func (a *app) printWorkspace(w *client.Workspace) error {
	if a.json {
		return a.emit(w)
	}
	env := make([]string, 0, len(w.Env))
	for _, k := range slices.Sorted(maps.Keys(w.Env)) {
		env = append(env, k+"="+w.Env[k])
	}
	internet := "no"
	if w.AllowInternet {
		internet = "yes"
	}
	machine := ""
	if w.MachinePID > 0 {
		machine = fmt.Sprintf("pid %d, %s, %s link, since %s", w.MachinePID, w.Accelerator, w.Link, formatAge(w.StartedAt))
	}
	return describe(a.stdout,
		field{"name", w.Name}, field{"id", w.ID}, field{"state", string(w.State)}, field{"reason", w.Reason},
		field{"created", formatAge(w.CreatedAt)},
		field{"image", strings.TrimSpace(w.Image + " " + w.ImageDigest)}, field{"kernel", w.Kernel}, field{"init", w.Init},
		field{"cpus", strconv.Itoa(w.CPUs)}, field{"memory", formatBytes(w.MemoryMiB << 20)},
		field{"disk", formatBytes(w.DiskUsedBytes) + " of " + formatBytes(w.DiskBytes)},
		field{"user", w.User}, field{"workdir", w.Workdir}, field{"env", strings.Join(env, "\n")},
		field{"hostname", w.Hostname}, field{"address", w.Address}, field{"mac", w.MAC}, field{"internet", internet},
		field{"machine", machine},
	)
}

// each does fn for every ref, goes on past errors, prints all of them but the
// last, and returns that: what can be done is done.
func (a *app) each(refs []string, fn func(ref string) error) error {
	var last error
	for _, ref := range refs {
		if err := fn(ref); err != nil {
			if last != nil {
				a.report(last)
			}
			last = err
		}
	}
	return last
}

func (a *app) newStop() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "stop [flags] WORKSPACE...", Short: "Shut workspaces down and keep their disks",
		Example: `  agentiso stop box
  agentiso stop --force box   # as if the plug were pulled`,
		Args: nargs(1, -1, "workspaces"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(args, func(ref string) error {
				p := a.progress("stopping " + ref)
				w, err := c.Stop(ctx, ref, force)
				p.stop()
				if err != nil {
					return err
				}
				return a.done(w.Name, w)
			})
		}),
		ValidArgsFunction: a.completeWorkspaces,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "end the machine without asking the guest")
	return cmd
}

// done prints what was dealt with: its name, or v with --json.
func (a *app) done(name string, v any) error {
	if a.json {
		return a.emit(v)
	}
	fmt.Fprintln(a.stdout, name)
	return nil
}

func (a *app) newStart() *cobra.Command {
	return &cobra.Command{
		Use: "start WORKSPACE...", Short: "Boot stopped workspaces",
		Example: "  agentiso start box",
		Args:    nargs(1, -1, "workspaces"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(args, func(ref string) error {
				p := a.progress("starting " + ref)
				w, t, err := c.Start(ctx, ref)
				p.stop()
				if err != nil {
					return err
				}
				return a.printCreated(w, t, false)
			})
		}),
		ValidArgsFunction: a.completeWorkspaces,
	}
}

func (a *app) newDestroy() *cobra.Command {
	return &cobra.Command{
		Use: "destroy WORKSPACE...", Aliases: []string{"rm"}, Short: "Remove workspaces with their disks",
		Long: `Destroy ends the machines of workspaces, in whatever state they are, and removes
them with everything in them.`,
		Example: `  agentiso destroy box
  agentiso destroy $(agentiso ls -q)`,
		Args: nargs(1, -1, "workspaces"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(args, func(ref string) error {
				p := a.progress("destroying " + ref)
				id, err := c.Destroy(ctx, ref)
				p.stop()
				if err != nil {
					return err
				}
				return a.done(ref, map[string]string{"id": id})
			})
		}),
		ValidArgsFunction: a.completeWorkspaces,
	}
}

func (a *app) newRename() *cobra.Command {
	return &cobra.Command{
		Use: "rename WORKSPACE NAME", Short: "Give a workspace another name",
		Example: "  agentiso rename ws-7k3mvp2q box",
		Args:    nargs(2, 2, "a workspace and its new name"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			w, err := c.Rename(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			return a.done(w.Name, w)
		}),
		ValidArgsFunction: a.completeOneWorkspace,
	}
}
