package cmdrun

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestHostReturnsOutputInTheCLocale(t *testing.T) {
	t.Setenv("LC_ALL", "de_DE.UTF-8")
	out, err := Host(t.Context(), "sh", "-c", "echo $LC_ALL")
	if err != nil || string(out) != "C\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestErrorKeepsTheTailOfStderr(t *testing.T) {
	_, err := Host(t.Context(), "sh", "-c", "yes first | head -c 8192 >&2; echo last words >&2; exit 3")
	ce, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("error is %T", err)
	}
	if len(ce.Stderr) > stderrLimit || !strings.HasSuffix(ce.Stderr, "last words\n") {
		t.Errorf("stderr is %d bytes, ends %q", len(ce.Stderr), ce.Stderr[max(0, len(ce.Stderr)-20):])
	}
	if ee, ok := errors.AsType[*exec.ExitError](err); !ok || ee.ExitCode() != 3 {
		t.Errorf("exit is %v", err)
	}
}

func TestMissingCommand(t *testing.T) {
	if _, err := Host(t.Context(), "no-such-command-here"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("error is %v", err)
	}
}

// TestCancelEndsTheWholeGroup starts a grandchild that ignores SIGTERM and
// holds the pipe: the call must return, and the grandchild be gone.
func TestCancelEndsTheWholeGroup(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out := &firstLine{got: make(chan string, 1)}
	done := make(chan error, 1)
	go func() {
		done <- Stream(ctx, Command{Argv: []string{"sh", "-c", "sleep 600 & echo $!; wait"}, Stdout: out})
	}()
	pid := atoi(t, <-out.got)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want canceled", err)
	}
	for deadline := time.Now().Add(5 * time.Second); syscall.Kill(pid, 0) == nil && !zombie(pid); {
		if time.Now().After(deadline) {
			t.Fatalf("grandchild %d is alive", pid)
		}
	}
}
