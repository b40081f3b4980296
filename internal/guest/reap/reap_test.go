package reap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// Orphans of the tests' children come to this process.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "set child subreaper:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.signal_recv"))
}

// run returns a running Reaper; it stops with the test.
func run(t *testing.T) *Reaper {
	t.Helper()
	r := New()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

func launch(t *testing.T, r *Reaper, argv ...string) *Child {
	t.Helper()
	c, err := r.Start(exec.Command(argv[0], argv[1:]...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// eventually polls until ok or a generous deadline.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// children returns this process's children, dead and alive.
func children(t *testing.T) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			n, _ := strconv.Atoi(s)
			pids = append(pids, n)
		}
	}
	return pids
}

func TestStatusIsTheChildsOwn(t *testing.T) {
	r := run(t)
	tests := []struct {
		script string
		check  func(syscall.WaitStatus) bool
	}{
		{"exit 0", func(ws syscall.WaitStatus) bool { return ws.Exited() && ws.ExitStatus() == 0 }},
		{"exit 42", func(ws syscall.WaitStatus) bool { return ws.Exited() && ws.ExitStatus() == 42 }},
		{"kill -KILL $$", func(ws syscall.WaitStatus) bool { return ws.Signaled() && ws.Signal() == syscall.SIGKILL }},
	}
	for _, tt := range tests {
		ws, err := launch(t, r, "/bin/sh", "-c", tt.script).Wait()
		if err != nil || !tt.check(ws) {
			t.Errorf("%s: status %x, err %v", tt.script, ws, err)
		}
	}
}

// TestManyChildrenAndOrphans starts children with known statuses from several
// goroutines, all of which also leave orphans behind, some of them leaders of
// sessions: the hardest to tell from a child that has yet to be registered.
func TestManyChildrenAndOrphans(t *testing.T) {
	r := run(t)
	n, workers := 2000, 8
	if testing.Short() {
		n = 200
	}
	scripts := []string{
		"exit %d",
		"(exit 77) & exit %d",
		"(setsid sh -c 'exit 78' &) ; exit %d",
		"( (exit 79) & (exit 80) & ) ; exit %d",
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				want := i % 76
				cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf(scripts[i%len(scripts)], want))
				c, err := r.Start(cmd)
				if err != nil {
					t.Errorf("start %d: %v", i, err)
					return
				}
				if ws, err := c.Wait(); err != nil || ws.ExitStatus() != want {
					t.Errorf("child %d: status %x, err %v, want exit %d", i, ws, err, want)
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "all orphans collected", func() bool { return len(children(t)) == 0 })
}

func TestFailedStartLeavesNothing(t *testing.T) {
	r := run(t)
	for range 50 {
		if _, err := r.Start(exec.Command("/nonexistent/program")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("err %v", err)
		}
	}
	eventually(t, "no child is left", func() bool { return len(children(t)) == 0 })
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.starting)+len(r.children) != 0 {
		t.Errorf("starting %d, children %d", len(r.starting), len(r.children))
	}
}

// orphan leaves a dead child of this process that no Reaper has collected.
func orphan(t *testing.T, sid bool) int {
	t.Helper()
	p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: sid}})
	if err != nil {
		t.Fatal(err)
	}
	pid := p.Pid
	_ = p.Release()
	eventually(t, "it is a zombie", func() bool { return zombie(unix.P_PID, pid) == pid })
	t.Cleanup(func() { _, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil) })
	return pid
}

func TestUnknownZombieWaitsForStartsUnderWay(t *testing.T) {
	r := New()
	old := &start{seq: 1, at: time.Now()}
	r.seq = 1
	r.starting[old] = struct{}{}
	pid := orphan(t, true)

	if holding := r.collect(); !holding || !isChild(pid) {
		t.Fatalf("holding %t, there %t: want it held", holding, isChild(pid))
	}
	// A known child behind it is collected all the same.
	known := orphan(t, true)
	c := &Child{r: r, pid: known, done: make(chan struct{})}
	r.children[known] = c
	r.collect()
	if ws, err := c.Wait(); err != nil || !ws.Exited() {
		t.Errorf("known child: %x, %v", ws, err)
	}
	// A Start that began after the zombie was seen does not prolong its wait.
	delete(r.starting, old)
	r.seq = 2
	r.starting[&start{seq: 2, at: time.Now()}] = struct{}{}
	if holding := r.collect(); holding || isChild(pid) {
		t.Errorf("holding %t, there %t: want it collected", holding, isChild(pid))
	}
}

func TestHungStartHoldsNothingUp(t *testing.T) {
	r := New()
	r.seq = 1
	r.starting[&start{seq: 1, at: time.Now().Add(-startGrace)}] = struct{}{}
	pid := orphan(t, true)
	if holding := r.collect(); holding || isChild(pid) {
		t.Errorf("holding %t, there %t: want it collected", holding, isChild(pid))
	}
}

func TestStatusCollectedElsewhere(t *testing.T) {
	r := New()
	pid := orphan(t, true)
	c := &Child{r: r, pid: pid, done: make(chan struct{})}
	r.children[pid] = c
	if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
		t.Fatal(err)
	}
	r.bury(pid)
	if _, err := c.Wait(); !errors.Is(err, ErrLost) {
		t.Errorf("err %v, want ErrLost", err)
	}
}

func TestWithoutOrphansOthersChildrenAreLeftAlone(t *testing.T) {
	r := New()
	r.orphans = false
	pid := orphan(t, false)
	own := orphan(t, true)
	c := &Child{r: r, pid: own, done: make(chan struct{})}
	r.children[own] = c
	if r.collect() {
		t.Error("holding")
	}
	if _, err := c.Wait(); err != nil {
		t.Error(err)
	}
	if !isChild(pid) {
		t.Error("a foreign child was collected")
	}
}

func TestSignals(t *testing.T) {
	r := run(t)
	c := launch(t, r, "/bin/sleep", "1000")
	if sid, err := unix.Getsid(c.PID()); err != nil || sid != c.PID() {
		t.Errorf("session %d, %v; want its own, %d", sid, err, c.PID())
	}
	if err := c.SignalGroup(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if ws, err := c.Wait(); err != nil || ws.Signal() != syscall.SIGTERM {
		t.Errorf("status %x, %v", ws, err)
	}
	if err := c.Signal(syscall.SIGKILL); !errors.Is(err, ErrExited) {
		t.Errorf("signal after the end: %v", err)
	}
}

func TestStop(t *testing.T) {
	r := New()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	c := launch(t, r, "/bin/sleep", "1000")
	cancel()
	<-done
	if _, err := c.Wait(); !errors.Is(err, ErrStopped) {
		t.Errorf("wait: %v, want ErrStopped", err)
	}
	if _, err := r.Start(exec.Command("/bin/true")); !errors.Is(err, ErrStopped) {
		t.Errorf("start: %v, want ErrStopped", err)
	}
	_ = syscall.Kill(c.PID(), syscall.SIGKILL)
	_, _ = syscall.Wait4(c.PID(), nil, 0, nil)
}

func TestStartRefusesWhatNeedsWait(t *testing.T) {
	r := New()
	if _, err := r.Start(exec.CommandContext(t.Context(), "/bin/true")); err == nil {
		t.Error("a command with a context was accepted")
	}
	cmd := exec.Command("/bin/true")
	cmd.Stdout = &strings.Builder{}
	if _, err := r.Start(cmd); err == nil {
		t.Error("a stream that is not a file was accepted")
	}
}
