package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/fault"
)

// app is what the commands share: the global flags, the streams, and how the
// daemon is found.
type app struct {
	stdin          *os.File
	stdout, stderr *os.File

	configPath string
	socket     string
	json       bool
	parsed     bool // the command line is understood, json therefore final

	mu      sync.Mutex
	restore func() // gives the terminal back; nil when it is not ours
}

// systemSocket is where a daemon of root's listens; other users fall back to
// it when they have none of their own.
const systemSocket = "/run/agentiso/agentiso.sock"

// socketEnv names the variable that says where the daemon listens, like
// --socket.
const socketEnv = "AGENTISO_SOCKET"

// settings are those of file and environment.
func (a *app) settings() (*config.Config, error) {
	return config.Load(a.configPath, config.ThisHost())
}

// config is what is in force on this command line: --socket also says where
// our own daemon listens.
func (a *app) config() (*config.Config, error) {
	cfg, err := a.settings()
	if err != nil {
		return nil, err
	}
	if s := cmp.Or(a.socket, os.Getenv(socketEnv)); s != "" {
		if cfg.Server.Socket, err = filepath.Abs(s); err != nil {
			return nil, err
		}
	}
	return cfg, nil
}

// socketPath finds the daemon's socket: the flag, the variable, the
// configuration; and for users whose own daemon is not there, root's.
func (a *app) socketPath() (string, error) {
	if s := cmp.Or(a.socket, os.Getenv(socketEnv)); s != "" {
		return filepath.Abs(s)
	}
	cfg, err := a.settings()
	if err != nil {
		return "", err
	}
	own := cfg.Server.Socket
	if _, err := os.Stat(own); errors.Is(err, fs.ErrNotExist) && cfg.Origin("server.socket").Source == "default" {
		if _, err := os.Stat(systemSocket); err == nil {
			return systemSocket, nil
		}
	}
	return own, nil
}

// client returns a client of the daemon; the caller closes it.
func (a *app) client() (*client.Client, error) {
	socket, err := a.socketPath()
	if err != nil {
		return nil, err
	}
	return client.New(client.Options{Socket: socket})
}

// a command that talks to the daemon.
type daemonCommand func(ctx context.Context, c *client.Client, args []string) error

// withDaemon runs fn with a client, under a context that signals end.
func (a *app) withDaemon(fn daemonCommand) func(*cobra.Command, []string) error {
	return a.interruptible(func(ctx context.Context, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		defer c.Close()
		return fn(ctx, c, args)
	})
}

// signalled is the cause of a context that a signal has ended.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return "interrupted: " + s.String() }

// interruptible runs fn under a context that the first SIGINT, SIGTERM or
// SIGHUP ends. The second ends the program at once, with the terminal as it
// was.
func (a *app) interruptible(fn func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithCancelCause(cmd.Context())
		defer cancel(nil)
		signals := make(chan os.Signal, 2)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		done := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				case s := <-signals:
					sig, _ := s.(syscall.Signal)
					if n > 0 {
						a.restoreTerminal()
						os.Exit(128 + int(sig))
					}
					cancel(signalled{sig})
				}
			}
		})
		defer watch.Wait()
		defer close(done)
		defer signal.Stop(signals)
		err := fn(ctx, args)
		if s, ok := errors.AsType[signalled](context.Cause(ctx)); ok && err != nil {
			if _, own := errors.AsType[exitError](err); !own {
				return exitError{code: 128 + int(s.Signal), err: err}
			}
		}
		return err
	}
}

// exitError leaves with a code of its own; without err it prints nothing.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e exitError) Unwrap() error { return e.err }

// emit prints v as one line of JSON.
func (a *app) emit(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// report prints an error for people, or as JSON, and returns the exit code.
func (a *app) report(err error) int {
	if e, ok := errors.AsType[exitError](err); ok && e.err == nil {
		return e.code
	}
	p := problemOf(err)
	if a.json {
		enc := json.NewEncoder(a.stderr)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(map[string]problem{"error": p}) // nowhere else to say it
		return p.ExitCode
	}
	fmt.Fprintf(a.stderr, "agentiso: %s\n", clean(p.Message))
	if p.Next != "" {
		fmt.Fprintf(a.stderr, "  next: %s\n", clean(p.Next))
	}
	return p.ExitCode
}

// problem is an error as it is printed.
type problem struct {
	Kind     string `json:"kind"`
	Message  string `json:"message"`
	Next     string `json:"next,omitempty"`
	ExitCode int    `json:"exit_code"`
}

func problemOf(err error) problem {
	var p problem
	if e, ok := errors.AsType[*client.Error](err); ok {
		p = problem{string(e.Kind), e.Message, e.Next, e.ExitCode()}
	} else {
		f := fault.As(err)
		p = problem{string(f.Kind), f.Msg, f.Next, f.Kind.Codes().Exit}
	}
	if e, ok := errors.AsType[exitError](err); ok {
		p.ExitCode = e.code
	}
	return p
}

// clean takes control characters out of what may be a guest's words, so that
// they cannot drive the terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= 0x20 && r != 0x7f && (r < 0x80 || r > 0x9f) {
			return r
		}
		return -1
	}, s)
}

// printable makes w safe for a guest's text when it is a terminal.
func (a *app) printable(f *os.File) io.Writer {
	if !isTerminal(f) {
		return f
	}
	return &cleanWriter{w: f}
}

// cleanWriter takes the same out as clean does, from text that comes in pieces.
type cleanWriter struct {
	w io.Writer
	// lead says that the last byte was c1Lead and awaits the next.
	lead bool
}

// c1Lead begins the characters U+0080 to U+00BF in UTF-8. The lower half of
// them are control characters, of which U+009B does what ESC [ does.
const c1Lead = 0xc2

func (c *cleanWriter) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p)+1)
	for _, b := range p {
		if c.lead {
			c.lead = false
			if b >= 0x80 && b <= 0x9f {
				continue
			}
			out = append(out, c1Lead)
		}
		if c.lead = b == c1Lead; c.lead {
			continue
		}
		if b == '\n' || b == '\t' || b >= 0x20 && b != 0x7f {
			out = append(out, b)
		}
	}
	if _, err := c.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// rawTerminal puts the terminal of stdin into raw mode until the returned
// function, or the end of the program, gives it back.
func (a *app) rawTerminal() (back func(), err error) {
	fd := int(a.stdin.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	a.mu.Lock()
	a.restore = sync.OnceFunc(func() { _ = term.Restore(fd, old) })
	a.mu.Unlock()
	return a.restoreTerminal, nil
}

func (a *app) restoreTerminal() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.restore != nil {
		a.restore()
		a.restore = nil
	}
}

// note prints a line for people on stderr; never with --json.
func (a *app) note(format string, args ...any) {
	if !a.json {
		fmt.Fprintf(a.stderr, format+"\n", args...)
	}
}
