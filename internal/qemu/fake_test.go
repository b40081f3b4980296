package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/internal/domain"
)

// TestMain makes the test's own program a stand-in for QEMU: run with the
// arguments of a machine, it serves the inherited sockets, and what is written
// to its agent socket says what it does next.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("QEMU emulator version 7.2.22 (fake)")
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "-name" {
		fakeQEMU(os.Args)
	}
	goleak.VerifyTestMain(m)
}

// A fakeMachine is what the stand-in knows.
type fakeMachine struct {
	mu      sync.Mutex
	monitor net.Conn
	console net.Conn
	status  string
	conts   int
}

func fakeQEMU(args []string) {
	cmdline := args[slices.Index(args, "-append")+1]
	has := func(word string) bool { return slices.Contains(strings.Fields(cmdline), word) }
	if has("fake=refuse") {
		fmt.Fprintln(os.Stderr, `2026-01-02T03:04:05.678901Z qemu-system-x86_64: -blockdev driver=qcow2: Could not open '/no/such': No such file or directory`)
		os.Exit(1)
	}
	if has("fake=mute") {
		_ = syscall.Pause() // until it is killed; select {} may count as a deadlock
		return
	}
	f := &fakeMachine{status: "prelaunch"}
	listener := func(fd uintptr) net.Listener {
		file := os.NewFile(fd, "listener")
		l, err := net.FileListener(file)
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
			os.Exit(2)
		}
		file.Close() // two names for one socket would outlive each other
		return l
	}
	qmp, console, agent := listener(3), listener(4), listener(5)
	go func() {
		for {
			c, err := console.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.console = c
			f.mu.Unlock()
			_, _ = io.Copy(io.Discard, c)
			f.mu.Lock()
			f.console = nil
			f.mu.Unlock()
		}
	}()
	go func() {
		for {
			c, err := agent.Accept()
			if err != nil {
				return
			}
			for s := bufio.NewScanner(c); s.Scan(); {
				f.obey(s.Text())
				fmt.Fprintln(c, "ok", s.Text())
			}
		}
	}()
	for {
		c, err := qmp.Accept()
		if err != nil {
			os.Exit(2)
		}
		f.serve(c)
	}
}

func (f *fakeMachine) serve(c net.Conn) {
	f.mu.Lock()
	f.monitor = c
	f.mu.Unlock()
	fmt.Fprintln(c, `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}`)
	for s := bufio.NewScanner(c); s.Scan(); {
		var cmd struct {
			Execute string
			ID      uint64
		}
		_ = json.Unmarshal(s.Bytes(), &cmd)
		f.mu.Lock()
		answer := "{}"
		switch cmd.Execute {
		case "query-chardev":
			name := "unix:x,server=on"
			if f.console == nil {
				name = "disconnected:" + name
			}
			answer = fmt.Sprintf(`[{"label": "console", "filename": %q}]`, name)
		case "query-status":
			answer = fmt.Sprintf(`{"status": %q}`, f.status)
		case "cont":
			f.conts++
			if f.conts == 1 {
				fmt.Fprint(f.console, "fake: first line\r\n")
			}
			f.status = "running"
		}
		fmt.Fprintf(c, `{"return": %s, "id": %d}`+"\n", answer, cmd.ID)
		f.mu.Unlock()
	}
}

func (f *fakeMachine) obey(line string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	verb, arg, _ := strings.Cut(line, " ")
	switch verb {
	case "print":
		if f.console != nil {
			fmt.Fprint(f.console, arg+"\r\n")
		}
	case "shutdown":
		fmt.Fprintf(f.monitor, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": %q}}`+"\n", arg)
		os.Exit(0)
	case "enospc":
		f.status = "io-error"
		fmt.Fprintln(f.monitor, `{"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "nospace": true, "device": "", "operation": "write"}}`)
	case "status":
		fmt.Fprintln(f.console, "status", f.status)
	case "die":
		fmt.Fprintln(os.Stderr, "2026-01-02T03:04:05.678901Z qemu-system-x86_64: virtio: bogus \x1b[31mdescriptor")
		os.Exit(3)
	}
}

// world is an Owner over a directory of its own.
type world struct {
	t    *testing.T
	dir  string
	opts Options
	*Owner
}

func newWorld(t *testing.T, edit func(*Options)) *world {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "qw") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, opts: Options{
		RunDir: filepath.Join(dir, "r"), ConsoleDir: filepath.Join(dir, "c"), StateDir: filepath.Join(dir, "s"),
		Binary: self, Accel: TCG, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}}
	if edit != nil {
		edit(&w.opts)
	}
	w.Owner = w.open()
	t.Cleanup(w.end)
	return w
}

func (w *world) open() *Owner {
	w.t.Helper()
	o, err := NewOwner(w.opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

// restart stands for the daemon's: the next Owner knows nothing of the first.
func (w *world) restart() {
	w.t.Helper()
	w.Close()
	w.Owner = w.open()
}

// end kills what is left, and checks that nothing then is.
func (w *world) end() {
	ctx := context.Background()
	left, err := w.List(ctx)
	if err != nil {
		w.t.Error(err)
	}
	for _, id := range left {
		if err := w.Kill(ctx, id); err != nil {
			w.t.Error(err)
		}
	}
	w.Close()
	for _, parent := range []string{w.machinesDir(), w.probesDir()} {
		if left, err := listUnder(parent); err != nil || len(left) > 0 {
			w.t.Errorf("left in %s: %v, %v", parent, left, err)
		}
	}
}

func (w *world) spec(id string) domain.MachineSpec {
	s := plainSpec()
	s.ID = id
	s.CPUs = 1
	return s
}

func (w *world) start(spec domain.MachineSpec) domain.Process {
	w.t.Helper()
	p, err := w.Start(w.t.Context(), spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// tell sends a line to what serves the agent's socket and waits for its echo,
// unless the line ends it.
func tell(ctx context.Context, p domain.Process, line string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", p.Endpoint.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	echo, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if want := "ok " + line + "\n"; echo != want {
		return fmt.Errorf("echo %q, want %q", echo, want)
	}
	return nil
}

func (w *world) tell(p domain.Process, line string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	if err := tell(ctx, p, line); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		w.t.Fatalf("tell %q: %v", line, err)
	}
}

func (w *world) await(what string, cond func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			w.t.Fatalf("not in 30 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (w *world) awaitExit(id string) domain.Exit {
	w.t.Helper()
	select {
	case <-w.Done(id):
	case <-time.After(30 * time.Second):
		w.t.Fatalf("machine %s does not end", id)
	}
	return w.Exit(id)
}

func alive(pid int) bool {
	_, err := startTicks(pid)
	return err == nil
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}
