// Package cmdrun runs short host commands. Long-lived children (QEMU) have
// their own owner in package qemu.
package cmdrun

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// stderrLimit bounds what is kept of a command's standard error: its end.
const stderrLimit = 4 << 10

// waitDelay is how long a finished or killed command's pipes may stay open in
// a grandchild before they are abandoned.
const waitDelay = 2 * time.Second

// An Error is a command that ran and failed, or could not be run.
type Error struct {
	Argv   []string
	Stderr string // at most the last 4 KiB
	Err    error  // often *exec.ExitError
}

func (e *Error) Error() string {
	s := strings.TrimSpace(e.Stderr)
	if s == "" {
		return fmt.Sprintf("%s: %v", e.Argv[0], e.Err)
	}
	return fmt.Sprintf("%s: %v: %s", e.Argv[0], e.Err, s)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Host runs argv on this machine in the C locale and returns its standard
// output. When ctx is done the command's whole process group gets SIGKILL; its
// pipes are abandoned two seconds later, so that a grandchild holding them
// cannot hang the caller.
func Host(ctx context.Context, argv ...string) ([]byte, error) {
	var out strings.Builder
	err := Stream(ctx, Command{Argv: argv, Stdout: &out})
	if err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}

// Command is one command with its streams.
type Command struct {
	Argv   []string
	Dir    string
	Env    []string // added to the environment
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer // sees everything; the error keeps the tail in any case
}

// Stream runs c to its end as [Host] does, with the caller's streams.
func Stream(ctx context.Context, c Command) error {
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Dir = c.Dir
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), c.Env...)
	cmd.WaitDelay = waitDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Stdin = c.Stdin
	cmd.Stdout = c.Stdout
	errb := &tail{limit: stderrLimit}
	cmd.Stderr = errb
	if c.Stderr != nil {
		cmd.Stderr = io.MultiWriter(c.Stderr, errb)
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return &Error{c.Argv, string(errb.b), err}
	}
	return nil
}

// tail keeps the last limit bytes written to it.
type tail struct {
	limit int
	b     []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - t.limit; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}
