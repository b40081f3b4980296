package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/internal/fault"
)

const rootLong = `agentiso gives AI agents Linux machines of their own: micro-VMs that are
cut off from this host and from each other.

A workspace is named by its name, its id, or an unambiguous prefix of its id.
The daemon is started with "agentiso up" and found at its socket (--socket,
$AGENTISO_SOCKET, or server.socket of the configuration).`

const rootExample = `  agentiso up                                         # start the daemon
  agentiso image build dev                            # make an image, once
  agentiso run -- python3 -c 'print("hello")'         # a machine for one command
  agentiso create --name box && agentiso exec -it box # one to stay, and a shell in it`

// execute runs the command line args and returns the exit code.
func execute(ctx context.Context, args []string) int {
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	root := a.newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if !a.parsed { // an error in the command line itself comes as JSON, too
		a.json = a.json || jsonAsked(args)
	}
	err = usageError(cmd, err)
	if code, ok := ownFailure[cmd.Name()]; ok && cmd.Parent() == root {
		err = asOwnFailure(err, code)
	}
	return a.report(err)
}

// jsonAsked looks for --json before the command that run and exec pass on.
func jsonAsked(args []string) bool {
	if i := slices.Index(args, "--"); i >= 0 {
		args = args[:i]
	}
	return slices.Contains(args, "--json") || slices.Contains(args, "--json=true")
}

func (a *app) newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:                "agentiso",
		Short:              "Linux machines of their own for AI agents",
		Long:               rootLong,
		Example:            rootExample,
		SilenceErrors:      true,
		SilenceUsage:       true,
		DisableSuggestions: true, // usageError makes its own
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.PersistentPreRun = func(*cobra.Command, []string) { a.parsed = true }
	f := root.PersistentFlags()
	f.StringVar(&a.configPath, "config", "", "configuration `file`")
	f.StringVar(&a.socket, "socket", "", "the daemon's socket, a `path`")
	f.BoolVar(&a.json, "json", false, `print JSON, one object a line (see "agentiso help json")`)
	_ = root.MarkPersistentFlagFilename("config", "toml")
	_ = root.MarkPersistentFlagFilename("socket")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		next := "See `" + cmd.CommandPath() + " --help`."
		if f, ok := errors.AsType[*fault.Error](err); ok && f.Next != "" {
			next = f.Next
		}
		return &fault.Error{Kind: fault.Invalid, Msg: err.Error(), Next: next, Err: err}
	})
	root.AddGroup(
		&cobra.Group{ID: "workspaces", Title: "Workspaces:"},
		&cobra.Group{ID: "images", Title: "Images and kernels:"},
		&cobra.Group{ID: "daemon", Title: "Daemon and host:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("workspaces", a.newRun(), a.newCreate(), a.newExec(), a.newCp(), a.newLs(), a.newInfo(), a.newLogs(), a.newStats(),
		a.newStop(), a.newStart(), a.newRename(), a.newDestroy())
	add("images", a.newImage(), a.newKernel())
	add("daemon", a.newUp(), a.newDown(), a.newServe(), a.newDoctor(), a.newConfig(), a.newBench(), a.newVersion())
	root.AddCommand(helpTopics()...)
	root.SetHelpCommandGroupID("daemon")
	root.SetCompletionCommandGroupID("daemon")
	return root
}

// group makes a command that only has others below it.
func group(use, short string, cmds ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use: use, Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	g.AddCommand(cmds...)
	return g
}

func unknownCommand(parent *cobra.Command, name string) error {
	next := "See `" + parent.CommandPath() + " --help`."
	parent.SuggestionsMinimumDistance = 2
	if like := parent.SuggestionsFor(name); len(like) > 0 {
		next = "Did you mean `" + parent.CommandPath() + " " + strings.Join(like, "` or `"+parent.CommandPath()+" ") + "`?"
	}
	return fault.New(fault.Invalid, "unknown command %q", name).WithNext("%s", next)
}

// usageError turns cobra's own errors into faults.
func usageError(cmd *cobra.Command, err error) error {
	if rest, ok := strings.CutPrefix(err.Error(), `unknown command "`); ok && cmd != nil {
		name, _, _ := strings.Cut(rest, `"`)
		return unknownCommand(cmd, name)
	}
	return err
}

// nargs demands between low and high arguments (high < 0: any number) and says
// what they are.
func nargs(low, high int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= low && (high < 0 || len(args) <= high) {
			return nil
		}
		return fault.New(fault.Invalid, "%s takes %s, not %s", cmd.CommandPath(), what, count(len(args), "argument")).
			WithNext("Usage: %s", cmd.UseLine())
	}
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
