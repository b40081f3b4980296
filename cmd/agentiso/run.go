package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

// releaseLimit bounds the wait for a workspace's destruction, which goes on in
// the daemon in any case.
const releaseLimit = 30 * time.Second

// runFlags are run's own.
type runFlags struct {
	machine       machineFlags
	session       sessionFlags
	keep, rm      bool
	showsTimings  bool
	givenCommand  []string
	createOptions client.CreateOptions
}

func (a *app) newRun() *cobra.Command {
	var r runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] [--] [COMMAND [ARG...]]",
		Short: "Run a command in a machine of its own",
		Long: `Run makes a workspace, runs a command in it, and destroys the workspace.

Its exit code is the command's (see "agentiso help exit-codes"). Without a
command the image's entrypoint and command run; with -t and none of these, a
login shell. The workspace is destroyed when the command has ended, when run is
interrupted, and even when run is killed, unless --keep is given. Ctrl-C ends
the command; a second one does not wait for the destruction. With -it keys go
to the command.

Standard input is passed on only with -i.`,
		Example: `  agentiso run -- python3 -c 'print("hello")'
  agentiso run -it --memory 2G --cpus 2 bash
  agentiso run -i -- tar -tz < archive.tar.gz
  agentiso run --internet --timeout 5m -e TOKEN -- sh -c 'git clone "$REPO" && make test'
  agentiso run --keep --name box -- true && agentiso exec -it box`,
		Args: cobra.ArbitraryArgs,
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			r.givenCommand = args
			return a.run(ctx, c, &r)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.BoolVar(&r.keep, "keep", false, "keep the workspace, running, when the command has ended")
	f.BoolVar(&r.rm, "rm", false, "destroy the workspace when the command has ended (the default)")
	f.BoolVar(&r.showsTimings, "timings", false, "print on standard error where the time of the start went")
	cmd.MarkFlagsMutuallyExclusive("keep", "rm")
	r.machine.add(a, cmd)
	r.session.add(cmd)
	return cmd
}

func (a *app) run(ctx context.Context, c *client.Client, r *runFlags) error {
	if err := r.session.check(a); err != nil {
		return err
	}
	var err error
	if r.createOptions, err = r.machine.options(); err != nil {
		return err
	}
	argv := r.givenCommand
	if len(argv) == 0 {
		if argv, err = imageCommand(ctx, c, r); err != nil {
			return err
		}
	}
	ws, timings, release, err := a.obtain(ctx, c, r)
	if err != nil {
		return err
	}
	defer release()
	if a.json {
		if err := a.emit(created{ws, timings}); err != nil {
			return err
		}
	}
	if r.showsTimings {
		a.note("%s", timingLine(ws, timings))
	}
	err = a.session(ctx, c, ws.ID, argv, &r.session, client.ExecOptions{})
	if r.keep {
		a.note("kept workspace %s; end it with `agentiso destroy %s`", ws.Name, ws.Name)
	}
	return err
}

// obtain makes the workspace; release destroys it unless it is kept.
func (a *app) obtain(ctx context.Context, c *client.Client, r *runFlags) (*client.Workspace, client.Timings, func(), error) {
	p := a.progress("creating a workspace")
	defer p.stop()
	if r.keep {
		ws, t, err := c.Create(ctx, r.createOptions)
		return ws, t, func() {}, err
	}
	h, err := c.Hold(ctx, r.createOptions)
	if err != nil {
		return nil, client.Timings{}, nil, err
	}
	return h.Workspace, h.Timings, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
		defer cancel()
		if err := h.Release(ctx); err != nil && client.KindOf(err) != client.Unavailable {
			a.note("agentiso: workspace %s was not destroyed: %s", h.Name, clean(err.Error()))
		}
	}, nil
}

// imageCommand is what runs without a command on the command line.
func imageCommand(ctx context.Context, c *client.Client, r *runFlags) ([]string, error) {
	image, err := c.Image(ctx, r.createOptions.Image)
	if err != nil {
		return nil, err
	}
	argv := slices.Concat(image.Entrypoint, image.Cmd)
	switch {
	case len(argv) > 0:
		return argv, nil
	case r.session.tty:
		return loginShell, nil
	}
	return nil, fault.New(fault.Invalid, "there is no command to run, and the image has none of its own").
		WithNext("Give a command, as in `agentiso run -- python3 -V`, or -it for a shell.")
}

// created is what create, start and run print with --json.
type created struct {
	Workspace *client.Workspace `json:"workspace"`
	Timings   client.Timings    `json:"timings"`
}

// timingLine tells in one line where the time went.
func timingLine(ws *client.Workspace, t client.Timings) string {
	var steps []string
	for _, s := range t.Steps {
		steps = append(steps, s.Name+" "+formatDuration(s.Duration))
	}
	line := fmt.Sprintf("%s ready in %s (%s start", ws.Name, formatDuration(t.Total), t.Start)
	if ws.Accelerator != "" {
		line += ", " + ws.Accelerator
	}
	line += ")"
	if len(steps) > 0 {
		line += ": " + strings.Join(steps, ", ")
	}
	return line
}
