package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

func (a *app) newExec() *cobra.Command {
	var s sessionFlags
	var user, workdir string
	var env, envFiles []string
	cmd := &cobra.Command{
		Use:   "exec [flags] WORKSPACE [--] [COMMAND [ARG...]]",
		Short: "Run a command in a workspace",
		Long: `Exec runs a command in a running workspace. Its exit code is the command's (see
"agentiso help exit-codes"). With -t and no command it is a login shell.
Interrupting exec kills the command; with -it keys go to it.`,
		Example: `  agentiso exec box -- ls -l /
  agentiso exec -it box
  agentiso exec -u user -w /srv -e DEBUG=1 box make test
  tar -c . | agentiso exec -i box tar -x -C /srv`,
		Args: nargs(1, -1, "a workspace and a command"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			if err := s.check(a); err != nil {
				return err
			}
			vars, err := environment(envFiles, env)
			if err != nil {
				return err
			}
			ref, argv := args[0], args[1:]
			if len(argv) > 0 && argv[0] == "--" {
				argv = argv[1:]
			}
			if len(argv) == 0 {
				if !s.tty {
					return fault.New(fault.Invalid, "there is no command to run").
						WithNext("Give one, as in `agentiso exec %s -- ls`, or -it for a shell.", ref)
				}
				argv = loginShell
			}
			return a.session(ctx, c, ref, argv, &s, client.ExecOptions{User: user, Workdir: workdir, Env: vars})
		}),
		ValidArgsFunction: a.completeOneWorkspace,
	}
	f := cmd.Flags()
	s.add(cmd)
	f.StringVarP(&user, "user", "u", "", "run as this `user` (default: the workspace's)")
	f.StringVarP(&workdir, "workdir", "w", "", "run in this `directory`")
	f.StringArrayVarP(&env, "env", "e", nil, "environment variable `KEY=VALUE`, or KEY to take it from here; may be repeated")
	f.StringArrayVar(&envFiles, "env-file", nil, "`file` of such lines; may be repeated")
	return cmd
}

func (a *app) newLogs() *cobra.Command {
	var follow, raw bool
	last := sizeFlag{unit: 1}
	cmd := &cobra.Command{
		Use: "logs [flags] WORKSPACE", Short: "Show what a workspace's console printed",
		Long: `Logs shows the console: what kernel and init print. On a terminal, control
characters are left out, for they are the guest's; --raw keeps them.`,
		Example: `  agentiso logs box
  agentiso logs -f --last 4K box`,
		Args: nargs(1, 1, "one workspace"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			out := a.printable(a.stdout)
			if raw {
				out = a.stdout
			}
			var events *eventWriter
			if a.json {
				events = &eventWriter{a: a, name: "data"}
				out = events
			}
			err := c.Logs(ctx, args[0], client.LogsOptions{Follow: follow, TailBytes: last.bytes}, func(b []byte) error {
				_, err := out.Write(b)
				return err
			})
			if ferr := events.flush(); err == nil {
				err = ferr
			}
			return err
		}),
		ValidArgsFunction: a.completeOneWorkspace,
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	f.Var(&last, "last", "begin with the last of it only: 4K, 1M")
	f.BoolVar(&raw, "raw", false, "keep control characters")
	return cmd
}

// statsOf is what stats prints with --json.
type statsOf struct {
	Name  string        `json:"name"`
	ID    string        `json:"id"`
	Stats *client.Stats `json:"stats"`
}

func (a *app) newStats() *cobra.Command {
	return &cobra.Command{
		Use: "stats [WORKSPACE...]", Short: "Show what running workspaces use",
		Long: `Stats shows what guests use, as they say, and HOST: the share of this host's
memory that the machine's process has. Without arguments, of all that run.`,
		Example: `  agentiso stats
  agentiso stats box --json | jq .stats.machine_pss_bytes`,
		Args: cobra.ArbitraryArgs,
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			all, err := a.statsTargets(ctx, c, args)
			if err != nil {
				return err
			}
			t := newTable(a.stdout, "NAME", "CPU", "MEMORY", "DISK", "PROCESSES", "AGENT", "HOST", "UP")
			err = a.each(all, func(ref string) error {
				w, err := c.Get(ctx, ref)
				if err != nil {
					return err
				}
				s, err := c.Stats(ctx, w.ID)
				if err != nil {
					return err
				}
				if a.json {
					return a.emit(statsOf{w.Name, w.ID, s})
				}
				host := "-"
				if s.MachinePSSBytes > 0 {
					host = formatBytes(s.MachinePSSBytes)
				}
				t.row(w.Name, fmt.Sprintf("%.1f %%", s.CPUUsedPercent),
					formatBytes(s.MemoryUsedBytes)+" of "+formatBytes(s.MemoryTotalBytes),
					formatBytes(s.DiskUsedBytes)+" of "+formatBytes(s.DiskTotalBytes),
					strconv.Itoa(s.Processes), formatBytes(s.AgentRSSBytes), host, formatDuration(s.Uptime))
				return nil
			})
			if a.json {
				return err
			}
			if ferr := t.flush(); err == nil {
				err = ferr
			}
			return err
		}),
		ValidArgsFunction: a.completeWorkspaces,
	}
}

func (*app) statsTargets(ctx context.Context, c *client.Client, args []string) ([]string, error) {
	if len(args) > 0 {
		return args, nil
	}
	all, err := c.List(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, w := range all {
		if w.State == client.Running {
			ids = append(ids, w.ID)
		}
	}
	return ids, nil
}
