package main

import (
	"context"
	"encoding/base64"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

// Exit codes of run and exec on their own account, as env(1) and timeout(1)
// have them.
const (
	exitTimeout       = 124
	exitOwnFailure    = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

// ownFailure are the commands whose other exit codes belong to the command
// inside.
var ownFailure = map[string]int{"run": exitOwnFailure, "exec": exitOwnFailure}

// asOwnFailure gives err the code, unless it has one of its own.
func asOwnFailure(err error, code int) error {
	if _, ok := errors.AsType[exitError](err); ok {
		return err
	}
	return exitError{code, err}
}

// sessionFlags are what run and exec say about the command.
type sessionFlags struct {
	interactive, tty bool
	timeout          time.Duration
}

func (s *sessionFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVarP(&s.interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&s.tty, "tty", "t", false, "give the command a terminal")
	f.DurationVar(&s.timeout, "timeout", 0, "kill the command after this `time`, such as 30s")
	_ = cmd.RegisterFlagCompletionFunc("timeout", cobra.NoFileCompletions)
	// What follows the first argument is the command's.
	f.SetInterspersed(false)
}

// check refuses what cannot work before anything is created.
func (s *sessionFlags) check(a *app) error {
	switch {
	case s.timeout < 0:
		return fault.New(fault.Invalid, "the timeout %s is negative", s.timeout).WithNext("Give a positive one, such as 30s.")
	case s.tty && a.json:
		return fault.New(fault.Invalid, "-t and --json exclude each other").WithNext("Leave one of them out.")
	case s.tty && s.interactive && !isTerminal(a.stdin):
		return fault.New(fault.Invalid, "-t needs a terminal, and standard input is none").WithNext("Leave out -t.")
	}
	return nil
}

// loginShell is what a terminal without a command gets: bash where there is
// one.
var loginShell = []string{"/bin/sh", "-c", `command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l`}

// session runs a command in a workspace with our own streams, and returns an
// exitError unless it exits with 0.
func (a *app) session(ctx context.Context, c *client.Client, ref string, argv []string, s *sessionFlags, o client.ExecOptions) error {
	// Whoever reads our output may stop: that ends the command, not us before
	// we have ended it.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	defer signal.Stop(broken)

	o.Timeout = s.timeout
	o.Stdout, o.Stderr = a.stdout, a.stderr
	var out, errOut *eventWriter
	if a.json {
		out, errOut = &eventWriter{a: a, name: "stdout"}, &eventWriter{a: a, name: "stderr"}
		o.Stdout, o.Stderr = out, errOut
	}
	if s.interactive {
		o.Stdin = a.stdin
	}
	if s.tty {
		end, err := a.terminal(s, &o)
		if err != nil {
			return err
		}
		defer end()
	}
	exit, err := c.Exec(ctx, ref, argv, o)
	if err == nil && a.json {
		err = errors.Join(out.flush(), errOut.flush(), a.emit(map[string]int{"exit_code": exit}))
	}
	switch {
	case err == nil && exit == 0:
		return nil
	case err == nil:
		return exitError{code: exit}
	case errors.Is(err, syscall.EPIPE):
		return exitError{code: 128 + int(syscall.SIGPIPE)}
	case errors.Is(err, client.ErrProgramNotFound):
		return exitError{exitNotFound, err}
	case errors.Is(err, client.ErrProgramNotExecutable):
		return exitError{exitNotExecutable, err}
	case client.KindOf(err) == client.Timeout && s.timeout > 0:
		return exitError{exitTimeout, err}
	}
	return err
}

// terminal makes ours the command's; end gives it back.
func (a *app) terminal(s *sessionFlags, o *client.ExecOptions) (end func(), err error) {
	resize := make(chan client.Size)
	o.TTY = &client.TTY{Size: a.terminalSize(), Resize: resize}
	if t := os.Getenv("TERM"); t != "" && o.Env["TERM"] == "" {
		env := map[string]string{"TERM": t}
		for k, v := range o.Env {
			env[k] = v
		}
		o.Env = env
	}
	back := func() {}
	if s.interactive {
		if back, err = a.rawTerminal(); err != nil {
			return nil, err
		}
	}
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, syscall.SIGWINCH)
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-winch:
			}
			select {
			case <-done:
				return
			case resize <- a.terminalSize():
			}
		}
	})
	return func() {
		signal.Stop(winch)
		close(done)
		watch.Wait()
		back()
	}, nil
}

// terminalSize is that of the terminal we print to; the usual one without it.
func (a *app) terminalSize() client.Size {
	for _, f := range []*os.File{a.stdout, a.stdin} {
		if w, h, err := term.GetSize(int(f.Fd())); err == nil && w > 0 && h > 0 {
			return client.Size{Cols: uint16(min(w, 1<<16-1)), Rows: uint16(min(h, 1<<16-1))}
		}
	}
	return client.Size{Cols: 80, Rows: 24}
}

// eventWriter prints output as JSON events. Text that is cut within a
// character waits for the rest of it.
type eventWriter struct {
	a    *app
	name string
	rest []byte
}

func (w *eventWriter) Write(p []byte) (int, error) {
	b := append(w.rest, p...)
	w.rest = nil
	for i := 1; i <= min(utf8.UTFMax-1, len(b)); i++ {
		if c := b[len(b)-i]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRune(b[len(b)-i:]) {
				w.rest = append([]byte(nil), b[len(b)-i:]...)
				b = b[:len(b)-i]
			}
			break
		}
	}
	if len(b) > 0 {
		if err := w.event(b); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (w *eventWriter) event(b []byte) error {
	if utf8.Valid(b) {
		return w.a.emit(map[string]string{w.name: string(b)})
	}
	return w.a.emit(map[string]string{w.name + "_base64": base64.StdEncoding.EncodeToString(b)})
}

func (w *eventWriter) flush() error {
	if w == nil || len(w.rest) == 0 {
		return nil
	}
	b := w.rest
	w.rest = nil
	return w.event(b)
}
