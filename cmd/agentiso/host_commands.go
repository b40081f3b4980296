package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
)

func (a *app) newDoctor() *cobra.Command {
	var probe bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check what agentiso needs of this host",
		Long: `Doctor looks at the host and says what is missing and what to do about it, with
or without a daemon. With one it also tells which accelerator machines get;
--probe finds that out anew by booting a guest. It leaves with 1 when a check
failed.`,
		Example: `  agentiso doctor
  agentiso doctor --probe
  agentiso doctor --json | jq -r 'select(.verdict != "ok") | .next'`,
		Args: nargs(0, 0, "no arguments"),
		RunE: a.interruptible(func(ctx context.Context, _ []string) error {
			p := a.progress("checking the host")
			checks, err := a.doctor(ctx, probe)
			p.stop()
			if err != nil {
				return err
			}
			return a.printChecks(checks)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&probe, "probe", false, "boot a guest to find the accelerator, even when it is known")
	return cmd
}

// answerLimit is how long a daemon that is well takes at the most to say who it
// is.
const answerLimit = 10 * time.Second

// doctor asks the daemon, and looks for itself when there is none or it hangs.
func (a *app) doctor(ctx context.Context, probe bool) ([]client.Check, error) {
	c, err := a.client()
	if err != nil {
		return nil, err // the configuration is what is wrong
	}
	defer c.Close()
	checks, err := []client.Check(nil), a.alive(ctx, c)
	if err == nil {
		checks, err = c.Doctor(ctx, probe)
	}
	if err == nil {
		return append([]client.Check{{Name: "daemon", Verdict: client.VerdictOK, Detail: "it answers on " + c.Socket()}}, checks...), nil
	}
	e, ok := err.(*client.Error) //nolint:errorlint // every error of the client is one
	if !ok || ctx.Err() != nil || e.Kind != client.Unavailable && e.Kind != client.Unauthorized {
		return nil, err
	}
	checks = []client.Check{{Name: "daemon", Verdict: client.VerdictWarn, Detail: e.Message, Next: e.Next}}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	for _, h := range hostChecks(ctx, cfg) {
		checks = append(checks, client.Check{Name: h.Name, Verdict: client.Verdict(h.Verdict), Detail: h.Detail, Next: h.Next})
	}
	return checks, nil
}

// alive tells a daemon that hangs, or has been stopped, from one that takes its
// time over the checks.
func (a *app) alive(ctx context.Context, c *client.Client) error {
	limited, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	_, err := c.Info(limited)
	if err != nil && ctx.Err() == nil && limited.Err() != nil {
		return &client.Error{Kind: client.Unavailable, Err: err,
			Message: fmt.Sprintf("the daemon on %s does not answer within %s", c.Socket(), answerLimit),
			Next:    "See whether its process is stopped or the host out of memory; machines run on when it is killed and started again."}
	}
	return err
}

func (a *app) printChecks(checks []client.Check) error {
	failed := false
	t := newTable(a.stdout, "CHECK", "VERDICT", "FOUND")
	for _, k := range checks {
		failed = failed || k.Verdict == client.VerdictFail
		if a.json {
			if err := a.emit(k); err != nil {
				return err
			}
			continue
		}
		t.row(k.Name, string(k.Verdict), k.Detail)
	}
	if !a.json {
		if err := t.flush(); err != nil {
			return err
		}
		for _, k := range checks {
			if k.Next != "" && k.Verdict != client.VerdictOK {
				fmt.Fprintf(a.stdout, "\n%s: %s\n  next: %s\n", clean(k.Name), clean(k.Detail), clean(k.Next))
			}
		}
	}
	if failed {
		return exitError{code: 1}
	}
	return nil
}

func (a *app) newConfig() *cobra.Command {
	return group("config", "Show the configuration", &cobra.Command{
		Use: "print", Short: "Print the settings in force",
		Long: `Print shows every setting with its value, what it is for, and where the value
comes from, as a configuration file that can be used as a start.`,
		Example: `  agentiso config print
  agentiso config print --json | jq -r 'select(.source != "default") | .key'`,
		Args: nargs(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.settings()
			if err != nil {
				return err
			}
			if !a.json {
				return cfg.Print(a.stdout)
			}
			for _, e := range cfg.Entries() {
				if err := a.emit(e); err != nil {
					return err
				}
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	})
}

// versionLimit bounds asking the daemon for its version.
const versionLimit = time.Second

func (a *app) newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the versions of this program and the daemon",
		Example: "  agentiso version",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.interruptible(func(ctx context.Context, _ []string) error {
			v := struct {
				Version string `json:"version"`
				Daemon  string `json:"daemon,omitempty"`
				Go      string `json:"go"`
			}{Version: version, Go: runtime.Version()}
			if c, err := a.client(); err == nil {
				defer c.Close()
				ctx, cancel := context.WithTimeout(ctx, versionLimit)
				defer cancel()
				if i, err := c.Info(ctx); err == nil {
					v.Daemon = i.Version
				}
			}
			if a.json {
				return a.emit(v)
			}
			fmt.Fprintf(a.stdout, "agentiso %s (%s)\n", v.Version, v.Go)
			if v.Daemon != "" {
				fmt.Fprintf(a.stdout, "daemon   %s\n", v.Daemon)
			}
			return nil
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}
