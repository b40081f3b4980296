package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	// logName is the log of a daemon that up started, in the data directory;
	// maxLog is when it becomes logName.1.
	logName = "daemon.log"
	maxLog  = 16 << 20
	// logTail is how much of it an error shows.
	logTail = 2 << 10
	// pollTime is how often a daemon that comes or goes is looked at.
	upTimeout = time.Minute
	pollTime  = 50 * time.Millisecond
	// stopLimit bounds down: the daemon lets calls under way be undone, and
	// with --stop-machines every guest shut down.
	stopLimit         = 60 * time.Second
	stopMachinesWaits = 3 * time.Minute
)

// running is what up and down print with --json.
type running struct {
	Running bool   `json:"running"`
	PID     int    `json:"pid,omitempty"`
	Socket  string `json:"socket"`
	Started bool   `json:"started,omitempty"`
	Stopped bool   `json:"stopped,omitempty"`
	Log     string `json:"log,omitempty"`
}

func (a *app) newUp() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "up", Short: "Start the daemon in the background",
		Long: `Up starts "agentiso serve" in a session of its own and returns when it answers.
It does nothing when a daemon answers already. The daemon's log is daemon.log in
its data directory.`,
		Example: "  agentiso up && agentiso ls",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.interruptible(func(ctx context.Context, _ []string) error {
			r, err := a.up(ctx, timeout)
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(r)
			}
			if r.Started {
				fmt.Fprintf(a.stdout, "agentiso runs (pid %d, log %s)\n", r.PID, r.Log)
			} else {
				fmt.Fprintf(a.stdout, "agentiso runs already (pid %d)\n", r.PID)
			}
			return nil
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().DurationVar(&timeout, "timeout", upTimeout, "how long it may take until it answers; `time`")
	return cmd
}

// up starts the daemon unless one answers.
func (a *app) up(ctx context.Context, timeout time.Duration) (running, error) {
	cfg, err := a.config()
	if err != nil {
		return running{}, err
	}
	socket := cfg.Server.Socket
	c, err := client.New(client.Options{Socket: socket})
	if err != nil {
		return running{}, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fault.New(fault.Timeout, "the daemon did not answer within %s", timeout))
	defer cancel()
	if i, err := c.Info(ctx); err == nil {
		return running{Running: true, PID: i.PID, Socket: socket}, nil
	} else if client.KindOf(err) == client.Unauthorized {
		return running{}, err // one runs, but not for us
	}
	if err := cfg.MakeDirs(); err != nil {
		return running{}, err
	}
	d, err := spawnDaemon(cfg)
	if err != nil {
		return running{}, err
	}
	p := a.progress("starting the daemon")
	defer p.stop()
	i, err := d.wait(ctx, c)
	if err != nil {
		return running{}, err
	}
	return running{Running: true, PID: i.PID, Socket: socket, Started: i.PID == d.cmd.Process.Pid, Log: d.log}, nil
}

// startDaemon brings the daemon up for the time being; stop ends it if it was
// not there before.
func (a *app) startDaemon(ctx context.Context) (stop func(context.Context) error, err error) {
	r, err := a.up(ctx, upTimeout)
	if err != nil || !r.Started {
		return func(context.Context) error { return nil }, err
	}
	return func(ctx context.Context) error {
		c, err := client.New(client.Options{Socket: r.Socket})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = a.down(ctx, c, false)
		return err
	}, nil
}

// background is a daemon that is coming up.
type background struct {
	cmd  *exec.Cmd
	log  string
	from int64 // where its part of the log begins
	done chan error
}

// spawnDaemon runs `agentiso serve` in a session of its own, with the log as
// its output.
func spawnDaemon(cfg *config.Config) (*background, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	d := &background{log: filepath.Join(cfg.Server.DataDir, logName), done: make(chan error, 1)}
	if st, err := os.Stat(d.log); err == nil && st.Size() > maxLog {
		if err := os.Rename(d.log, d.log+".1"); err != nil {
			return nil, fmt.Errorf("rotate the daemon's log: %w", err)
		}
	}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fault.New(fault.Missing, "open the daemon's log: %w", err).WithNext("Give this user the right to write there.")
	}
	defer log.Close()
	if st, err := log.Stat(); err == nil {
		d.from = st.Size()
	}
	args := []string{"--socket", cfg.Server.Socket, "serve"}
	if cfg.File != "" {
		path, err := filepath.Abs(cfg.File)
		if err != nil {
			return nil, err
		}
		args = append([]string{"--config", path}, args...)
	}
	d.cmd = exec.Command(self, args...) //nolint:noctx // it outlives us
	d.cmd.Dir = "/"
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, fault.New(fault.Missing, "start the daemon: %w", err).WithNext("Check that %s can be executed.", self)
	}
	go func() { d.done <- d.cmd.Wait() }() // ends with the daemon, or with us
	return d, nil
}

// wait returns when the daemon answers. One that does not in time is ended.
func (d *background) wait(ctx context.Context, c *client.Client) (*client.Info, error) {
	tick := time.NewTicker(pollTime)
	defer tick.Stop()
	for {
		if i, err := c.Info(ctx); err == nil {
			return i, nil
		}
		select {
		case err := <-d.done:
			// Two that come up at once: the other one won.
			if i, ierr := c.Info(ctx); ierr == nil {
				return i, nil
			}
			return nil, d.died(err)
		case <-ctx.Done():
			_ = d.cmd.Process.Signal(syscall.SIGTERM)
			f := fault.As(context.Cause(ctx))
			return nil, fault.New(f.Kind, "%s%s", f.Msg, d.tail()).WithNext("Its log is %s.", d.log)
		case <-tick.C:
		}
	}
}

// died tells why a daemon ended while it came up: its own words, which end its
// log, say it best.
func (d *background) died(err error) error {
	kind := fault.Internal
	if ee, ok := errors.AsType[*exec.ExitError](err); ok {
		for _, k := range []fault.Kind{fault.Invalid, fault.InUse, fault.NoSpace, fault.Missing} {
			if ee.ExitCode() == k.Codes().Exit {
				kind = k
			}
		}
	}
	return fault.New(kind, "the daemon ended while it started%s", d.tail()).WithNext("Its whole log is %s.", d.log)
}

// tail is the end of what the daemon logged, on lines of its own; its log lines
// proper are left out when it said more plainly what was wrong.
func (d *background) tail() string {
	f, err := os.Open(d.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	b, err := io.ReadAll(io.NewSectionReader(f, max(d.from, st.Size()-logTail), logTail))
	if err != nil {
		return ""
	}
	if i := bytes.LastIndex(b, []byte("agentiso: ")); i >= 0 && (i == 0 || b[i-1] == '\n') {
		b = b[i+len("agentiso: "):]
	}
	if s := strings.TrimSpace(string(b)); s != "" {
		return ": " + s
	}
	return ""
}

func (a *app) newDown() *cobra.Command {
	var stopMachines bool
	cmd := &cobra.Command{
		Use: "down", Short: "Stop the daemon",
		Long: `Down stops the daemon and returns when it has ended. Machines run on and are
taken back by the next daemon, unless --stop-machines is given. It does nothing
when no daemon runs.`,
		Example: `  agentiso down
  agentiso down --stop-machines`,
		Args: nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			r, err := a.down(ctx, c, stopMachines)
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(r)
			}
			if r.Stopped {
				fmt.Fprintf(a.stdout, "agentiso has ended (pid %d)\n", r.PID)
			} else {
				fmt.Fprintln(a.stdout, "agentiso does not run")
			}
			return nil
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&stopMachines, "stop-machines", false, "shut every machine down first")
	return cmd
}

func (a *app) down(ctx context.Context, c *client.Client, stopMachines bool) (running, error) {
	limit := stopLimit
	if stopMachines {
		limit = stopMachinesWaits
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fault.New(fault.Timeout, "the daemon did not end within %s", limit).
		WithNext("Look at its log; `agentiso info` tells its pid."))
	defer cancel()
	i, err := c.Info(ctx)
	if client.KindOf(err) == client.Unavailable {
		return running{Socket: c.Socket()}, nil
	}
	if err != nil {
		return running{}, err
	}
	// A descriptor of the process is not fooled by a pid that is used again.
	pidfd, err := unix.PidfdOpen(i.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return running{PID: i.PID, Socket: c.Socket(), Stopped: true}, nil
	}
	if err != nil {
		return running{}, fmt.Errorf("watch the daemon, pid %d: %w", i.PID, err)
	}
	defer unix.Close(pidfd)
	p := a.progress("stopping the daemon")
	defer p.stop()
	if err := c.Shutdown(ctx, stopMachines); err != nil && client.KindOf(err) != client.Unavailable {
		return running{}, err
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(pollTime.Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return running{}, fmt.Errorf("wait for the daemon, pid %d: %w", i.PID, err)
		}
		if n > 0 {
			return running{PID: i.PID, Socket: c.Socket(), Stopped: true}, nil
		}
		if ctx.Err() != nil {
			return running{}, context.Cause(ctx)
		}
	}
}
