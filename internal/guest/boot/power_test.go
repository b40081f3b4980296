package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// statLine is a line of /proc/PID/stat as the kernel writes it.
func statLine(pid int, comm, state string, tty int, flags uint64, start uint64) string {
	return fmt.Sprintf("%d (%s) %s 1 %d %d %d -1 %d 0 0 0 0 0 0 0 0 20 0 1 0 %d 1000 100 18446744073709551615\n",
		pid, comm, state, pid, pid, tty, flags, start)
}

func TestParseStat(t *testing.T) {
	for _, tt := range []struct {
		text string
		want process
		bad  bool
	}{
		{text: statLine(7, "sh", "S", 34816, 0x400000, 99), want: process{pid: 7, start: 99, terminal: true}},
		{text: statLine(8, ") Z 1 (", "R", 0, 0, 5), want: process{pid: 8, start: 5}},
		{text: statLine(2, "kthreadd", "S", 0, 0x208040, 0), want: process{pid: 2, kernel: true}},
		{text: statLine(9, "gone", "Z", 0, 0, 1), want: process{pid: 9, start: 1, ended: true}},
		{text: "", bad: true},
		{text: "7 sh S", bad: true},
		{text: "7 )sh( S 1", bad: true},
		{text: "7 (sh) S 1 2", bad: true},
	} {
		got, err := parseStat(tt.text)
		if (err != nil) != tt.bad || got != tt.want {
			t.Errorf("%q: got %+v, %v", tt.text, got, err)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add(statLine(7, "sh", "S", 34816, 0, 99))
	f.Add("1 (a")
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := parseStat(text); err != nil && p != (process{}) {
			t.Errorf("%q: an error and %+v", text, p)
		}
	})
}

func TestUserProcesses(t *testing.T) {
	root := t.TempDir()
	put := func(pid int, line string) { write(t, filepath.Join(root, fmt.Sprint(pid), "stat"), line) }
	put(1, statLine(1, "init", "S", 0, 0, 0))
	put(2, statLine(2, "kthreadd", "S", 0, kernelThread, 0))
	put(os.Getpid(), statLine(os.Getpid(), "self", "R", 0, 0, 0))
	put(3000001, statLine(3000001, "sh", "S", 1, 0, 4))
	put(3000002, statLine(3000002, "dead", "Z", 0, 0, 4))
	put(3000003, "garbage")
	write(t, filepath.Join(root, "meminfo"), "")
	var pids []int
	for _, p := range userProcesses(root) {
		pids = append(pids, p.pid)
	}
	if diff := cmp.Diff([]int{3000001}, pids); diff != "" {
		t.Error(diff)
	}
}

func TestWaitGone(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() // it is killed
	p, err := readProcess("/proc", cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if waitGone(t.Context(), []process{p}, 5*time.Millisecond) {
		t.Error("a living process counts as gone")
	}
	reused := p
	reused.start++
	if !waitGone(t.Context(), []process{reused}, time.Minute) {
		t.Error("another process with the same number is waited for")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// It stays a zombie until the Wait above.
	if !waitGone(t.Context(), []process{p}, time.Minute) {
		t.Error("a zombie is waited for")
	}
}

func TestWithin(t *testing.T) {
	boom := errors.New("boom")
	if err := within(t.Context(), func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	hang := make(chan struct{})
	defer close(hang)
	if err := within(ctx, func() error { <-hang; return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if sleep(ctx, time.Hour) {
		t.Error("slept though cancelled")
	}
}
