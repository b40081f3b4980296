package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

func TestStartAndKill(t *testing.T) {
	w := newWorld(t, nil)
	p := w.start(w.spec("one"))
	want := domain.Process{
		PID: p.PID, StartTicks: p.StartTicks, BootID: p.BootID,
		RunDir: filepath.Join(w.dir, "r/m/one"), Accel: TCG,
		Endpoint: domain.Endpoint{Kind: domain.LinkSerial, Socket: filepath.Join(w.dir, "r/m/one/agent.sock")},
	}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Errorf("process (-want +got):\n%s", diff)
	}
	st, err := os.Stat(p.RunDir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("run directory: %v, %v", st.Mode(), err)
	}
	if b, err := os.ReadFile(filepath.Join(p.RunDir, "pid")); err != nil || string(b) != fmt.Sprintln(p.PID) {
		t.Errorf("pid file: %q, %v", b, err)
	}
	if _, err := w.Start(t.Context(), w.spec("one")); !fault.Is(err, fault.WrongState) {
		t.Errorf("second start: %v", err)
	}
	select {
	case <-w.Done("one"):
		t.Error("done while it runs")
	default:
	}
	if got := w.Exit("one"); got != (domain.Exit{}) {
		t.Errorf("exit while it runs: %v", got)
	}
	w.await("first console line", func() bool { return string(w.Tail("one", 100)) == "fake: first line\r\n" })
	for range 2 {
		if err := w.Kill(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
	}
	if alive(p.PID) {
		t.Error("process lives")
	}
	if _, err := os.Stat(p.RunDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run directory: %v", err)
	}
	<-w.Done("one")
	if got := w.Exit("one"); got.Reason != "killed" || got.At.IsZero() {
		t.Errorf("exit %v", got)
	}
	if got := string(w.Tail("one", 5)); got != "ine\r\n" {
		t.Errorf("console after the end: %q", got)
	}
	if kept, err := w.ListConsoles(t.Context()); err != nil || len(kept) != 1 || kept[0] != "one" {
		t.Errorf("consoles %v, %v", kept, err)
	}
	if err := w.RemoveConsole("one"); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(w.opts.ConsoleDir); len(left) > 0 || w.Exit("one") != (domain.Exit{}) {
		t.Errorf("left of the console: %v, %v", left, w.Exit("one"))
	}
}

// TestChild looks at what a machine's process is given.
func TestChild(t *testing.T) {
	w := newWorld(t, nil)
	p := w.start(w.spec("one"))
	proc := "/proc/" + strconv.Itoa(p.PID) + "/"
	if env, err := os.ReadFile(proc + "environ"); err != nil || len(env) > 0 {
		t.Errorf("environment %q, %v", env, err)
	}
	if sid, err := syscall.Getpgid(p.PID); err != nil || sid != p.PID {
		t.Errorf("process group %d, %v", sid, err)
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil || !bytes.Contains(status, []byte("Umask:\t0077\n")) {
		t.Errorf("umask: %v\n%s", err, status)
	}
	if old := syscall.Umask(0o022); old == 0o077 {
		t.Error("the daemon's own umask has changed")
	} else {
		syscall.Umask(old)
	}
	limits, err := os.ReadFile(proc + "limits")
	if err != nil || !bytes.Contains(limits, []byte("Max core file size        0 ")) {
		t.Errorf("core limit: %v\n%s", err, limits)
	}
	if cwd, err := os.Readlink(proc + "cwd"); err != nil || cwd != "/" {
		t.Errorf("directory %q, %v", cwd, err)
	}
	for fd, want := range []string{"/dev/null", p.RunDir + "/qemu.log", p.RunDir + "/qemu.log"} {
		if got, err := os.Readlink(fmt.Sprint(proc, "fd/", fd)); err != nil || got != want {
			t.Errorf("descriptor %d is %q, %v, want %q", fd, got, err, want)
		}
	}
}

func TestMachineUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	w := newWorld(t, nil)
	if err := os.Chmod(w.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	// The stand-in must be reachable for another user.
	self, err := os.ReadFile(w.opts.Binary)
	if err != nil {
		t.Fatal(err)
	}
	w.binary.name = filepath.Join(w.dir, "fake")
	if err := os.WriteFile(w.binary.name, self, 0o755); err != nil {
		t.Fatal(err)
	}
	s := w.spec("one")
	s.UID = 54321
	p := w.start(s)
	status, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t54321\t54321\t54321\t54321\n", "Gid:\t54321\t54321\t54321\t54321\n", "Groups:\t \n", "CapEff:\t0000000000000000\n"} {
		if !bytes.Contains(status, []byte(want)) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	w.tell(p, "print still served")
}

func TestAdopt(t *testing.T) {
	w := newWorld(t, nil)
	p := w.start(w.spec("one"))
	w.await("console", func() bool { return len(w.Tail("one", 100)) > 0 })
	w.restart()
	if !alive(p.PID) {
		t.Fatal("the process did not outlive the daemon")
	}
	select {
	case <-w.Done("one"):
	default:
		t.Error("known before it was adopted")
	}
	if err := w.Adopt(t.Context(), "one", p); err != nil {
		t.Fatal(err)
	}
	if err := w.Adopt(t.Context(), "one", p); err != nil {
		t.Errorf("again: %v", err)
	}
	w.await("the console's connection", func() bool {
		w.tell(p, "print second")
		return bytes.Contains(w.Tail("one", 1000), []byte("second"))
	})
	if !bytes.HasPrefix(w.Tail("one", 1000), []byte("fake: first line\r\n")) {
		t.Errorf("the first daemon's part is lost: %q", w.Tail("one", 1000))
	}
	w.await("the monitor's connection", func() bool {
		w.tell(p, "enospc")
		return w.Paused("one") != ""
	})
	w.tell(p, "shutdown guest-shutdown")
	if e := w.awaitExit("one"); e.Reason != "guest shut down" {
		t.Errorf("exit %v", e)
	}
}

func TestAdoptRefusesOthers(t *testing.T) {
	w := newWorld(t, nil)
	p := w.start(w.spec("one"))
	q := w.start(w.spec("two"))
	w.restart()
	stranger := exec.Command("sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Process.Kill(); _ = stranger.Wait() }()
	ticks, err := startTicks(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		edit func(*domain.Process)
	}{
		{"another process with this pid", func(p *domain.Process) { p.PID, p.StartTicks = stranger.Process.Pid, ticks }},
		{"another machine", func(p *domain.Process) { p.PID, p.StartTicks = q.PID, q.StartTicks }},
		{"an earlier start", func(p *domain.Process) { p.StartTicks-- }},
		{"another boot", func(p *domain.Process) { p.BootID = "11111111-2222-3333-4444-555555555555" }},
		{"no process", func(p *domain.Process) { p.PID = 1 << 22 }},
		{"nothing", func(p *domain.Process) { p.PID = 0 }},
		{"a process group", func(p *domain.Process) { p.PID = -p.PID }},
		{"another directory", func(p *domain.Process) { p.RunDir = q.RunDir }},
		{"this process", func(p *domain.Process) { p.PID = os.Getpid() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wrong := p
			tt.edit(&wrong)
			if err := w.Adopt(t.Context(), "one", wrong); !errors.Is(err, domain.ErrNoMachine) {
				t.Errorf("got %v, want %v", err, domain.ErrNoMachine)
			}
		})
	}
	if err := w.Kill(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if alive(p.PID) || !alive(q.PID) || !alive(stranger.Process.Pid) {
		t.Errorf("alive: one %v, two %v, stranger %v", alive(p.PID), alive(q.PID), alive(stranger.Process.Pid))
	}
}

// TestUnrecordedProcess: a crash of the daemon between the start of a process
// and its record leaves one that only its command line tells of.
func TestUnrecordedProcess(t *testing.T) {
	w := newWorld(t, nil)
	p := w.start(w.spec("one"))
	other := newWorld(t, nil)
	q := other.start(other.spec("one"))
	w.restart()
	if err := os.RemoveAll(p.RunDir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(w.machinesDir(), "two"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, err := w.List(t.Context())
	if diff := cmp.Diff([]string{"one", "two"}, got); err != nil || diff != "" {
		t.Fatalf("%v (-want +got):\n%s", err, diff)
	}
	for _, id := range got {
		if err := w.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if alive(p.PID) || !alive(q.PID) {
		t.Errorf("alive: ours %v, another daemon's %v", alive(p.PID), alive(q.PID))
	}
}

func TestExits(t *testing.T) {
	tests := []struct {
		name, say string
		want      string
	}{
		{"shutdown", "shutdown guest-shutdown", "guest shut down"},
		{"reset", "shutdown guest-reset", "guest shut down"},
		{"exit", "die", "QEMU exited with status 3; it said: virtio: bogus �[31mdescriptor"},
	}
	w := newWorld(t, nil)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := w.start(w.spec("one"))
			w.tell(p, tt.say)
			if e := w.awaitExit("one"); e.Reason != tt.want {
				t.Errorf("got %q, want %q", e.Reason, tt.want)
			}
		})
	}
	t.Run("from outside", func(t *testing.T) {
		p := w.start(w.spec("one"))
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if e := w.awaitExit("one"); !strings.HasPrefix(e.Reason, "QEMU was killed by signal 9") {
			t.Errorf("got %q", e.Reason)
		}
	})
	t.Run("panic", func(t *testing.T) {
		p := w.start(w.spec("one"))
		w.tell(p, "print [    0.1] Kernel panic - not syncing: VFS: no root \x1b[31m")
		w.tell(p, "shutdown guest-reset")
		if e := w.awaitExit("one"); e.Reason != "guest kernel panic: VFS: no root �[31m" {
			t.Errorf("got %q", e.Reason)
		}
	})
	t.Run("an earlier panic", func(t *testing.T) {
		p := w.start(w.spec("one"))
		w.tell(p, "shutdown guest-reset")
		if e := w.awaitExit("one"); e.Reason != "guest shut down" {
			t.Errorf("got %q", e.Reason)
		}
	})
	t.Run("while away", func(t *testing.T) {
		p := w.start(w.spec("one"))
		w.restart()
		w.tell(p, "die")
		w.await("its end", func() bool { return !alive(p.PID) })
		if err := w.Adopt(t.Context(), "one", p); !errors.Is(err, domain.ErrNoMachine) {
			t.Errorf("adopt: %v", err)
		}
		if e := w.Exit("one"); e.Reason != "ended while the daemon was away; it said: virtio: bogus �[31mdescriptor" {
			t.Errorf("got %q", e.Reason)
		}
		if ws, ok := (&handle{pid: p.PID}).reap(); ok && ws.ExitStatus() != 3 {
			t.Errorf("status %v", ws)
		}
	})
}

func TestRefusedStart(t *testing.T) {
	w := newWorld(t, nil)
	s := w.spec("one")
	s.Boot.Append = "fake=refuse"
	_, err := w.Start(t.Context(), s)
	f := fault.As(err)
	if f.Kind != fault.Missing || f.Next == "" ||
		!strings.Contains(err.Error(), "QEMU refused to start: Could not open '/no/such': No such file or directory") {
		t.Errorf("got %v (%+v)", err, f)
	}
	if left, err := w.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := w.Start(t.Context(), domain.MachineSpec{ID: "../../etc"}); err == nil {
		t.Error("a path as id was taken")
	}
}

// TestSilentQEMU: the caller's patience is the limit, and nothing is left.
func TestSilentQEMU(t *testing.T) {
	w := newWorld(t, nil)
	s := w.spec("one")
	s.Boot.Append = "fake=mute"
	if _, err := w.Version(t.Context()); err != nil { // not part of the wait
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := w.Start(ctx, s); !fault.Is(err, fault.Timeout) {
		t.Errorf("got %v", err)
	}
	if left, err := w.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestMissingQEMU(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Binary = "/no/such/qemu" })
	_, err := w.Start(t.Context(), w.spec("one"))
	if f := fault.As(err); f.Kind != fault.Missing || !strings.Contains(f.Next, "apt-get install qemu-system-x86") {
		t.Errorf("got %+v", f)
	}
}

func TestLongRunDir(t *testing.T) {
	_, err := NewOwner(Options{RunDir: "/" + strings.Repeat("x", 90), ConsoleDir: t.TempDir()})
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
}

func TestNothingLeaks(t *testing.T) {
	w := newWorld(t, nil)
	w.start(w.spec("one")) // what is opened once is open
	if err := w.Kill(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	for i := range 20 {
		s := w.spec("one")
		if i%4 == 3 {
			s.Boot.Append = "fake=refuse"
			if _, err := w.Start(t.Context(), s); err == nil {
				t.Fatal("started")
			}
			continue
		}
		w.start(s)
		if err := w.Kill(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d files open, %d before", after, before)
	}
	if err := w.RemoveConsole("one"); err != nil {
		t.Error(err)
	}
	var left []string
	_ = filepath.WalkDir(w.dir, func(p string, _ os.DirEntry, _ error) error { left = append(left, p); return nil })
	want := []string{w.dir, w.dir + "/c", w.dir + "/r", w.dir + "/r/m", w.dir + "/r/p", w.dir + "/s"}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// TestFullDisk: a guest that waits for space is let go again.
func TestFullDisk(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.resumeEvery = 500 * time.Millisecond })
	p := w.start(w.spec("one"))
	w.tell(p, "enospc")
	w.await("the event", func() bool { return w.Paused("one") != "" })
	w.await("another try", func() bool { return w.Paused("one") == "" })
	w.tell(p, "status")
	w.await("the guest's status", func() bool { return bytes.Contains(w.Tail("one", 100), []byte("status running")) })
}
