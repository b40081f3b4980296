//go:build vm

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/agentiso/agentiso/client"
)

// TestGuest looks at two running workspaces from all sides: "a" of the minimal
// image, "dev" of the image that people use.
func TestGuest(t *testing.T) {
	h := newTestHost(t, "")
	c := h.start("")
	a := h.create(c, client.CreateOptions{Name: "a", Env: map[string]string{"GREETING": "hello"}})
	dev := h.create(c, client.CreateOptions{Name: "dev", Image: "dev"})

	t.Run("identity", func(t *testing.T) { testIdentity(t, c, a, dev) })
	t.Run("defaults", func(t *testing.T) { testDefaults(t, c) })
	t.Run("input", func(t *testing.T) { testInput(t, c) })
	t.Run("orphans", func(t *testing.T) { testOrphans(t, c) })
	t.Run("terminal", func(t *testing.T) { testTerminal(t, h) })
	t.Run("copy", func(t *testing.T) { testCopy(t, c) })
	t.Run("alone", func(t *testing.T) { testAlone(t, c, "a") })
	t.Run("flood", func(t *testing.T) { testFlood(t, h, c) })
	t.Run("internet", func(t *testing.T) {
		_, _, err := c.Create(t.Context(), client.CreateOptions{Name: "net", AllowInternet: true, MemoryMiB: 128})
		if client.KindOf(err) == client.Missing {
			t.Skipf("missing capability: a packet filter: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if out := sh(t, c, "net", "cat /etc/resolv.conf; ip route"); !strings.Contains(out, "nameserver 10.0.2.3") || !strings.Contains(out, "default via 10.0.2.2") {
			t.Errorf("a guest with internet access has\n%s", out)
		}
		if os.Geteuid() == 0 { // machines have users of their own, which the filter knows
			testAlone(t, c, "net")
		}
		h.destroy(c, "net")
	})
	h.destroy(c, "a", "dev")
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func (h *testHost) create(c *client.Client, o client.CreateOptions) *client.Workspace {
	h.t.Helper()
	w, _, err := c.Create(h.t.Context(), o)
	if err != nil {
		h.t.Fatal(err)
	}
	return w
}

func (h *testHost) destroy(c *client.Client, refs ...string) {
	h.t.Helper()
	for _, ref := range refs {
		if _, err := c.Destroy(h.t.Context(), ref); err != nil {
			h.t.Error(err)
		}
	}
}

// cli is the command line, talking to h's daemon.
func (h *testHost) cli(args ...string) *exec.Cmd {
	cmd := exec.Command(cmp.Or(h.exe, os.Args[0]), args...)
	cmd.Env = append(append(os.Environ(), h.env...), cliEnv+"=1", "AGENTISO_SOCKET="+h.socket(), "TERM=vt100")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.cred}
	return cmd
}

// testIdentity checks what Configure gives a guest, and that no two guests
// share what must be their own.
func testIdentity(t *testing.T, c *client.Client, guests ...*client.Workspace) {
	seen := map[string]string{}
	for _, w := range guests {
		facts := map[string]string{}
		for line := range strings.Lines(sh(t, c, w.Name, `
			echo hostname=$(hostname)
			echo file=$(cat /etc/hostname)
			echo machine-id=$(cat /etc/machine-id)
			echo random=$(head -c 32 /dev/urandom | sha256sum)
			echo uuid=$(cat /proc/sys/kernel/random/uuid)
			echo mac=$(cat /sys/class/net/eth0/address)
			echo address=$(ip -4 addr show eth0 | grep -w inet | tr -s " " | cut -d " " -f 3)
			echo route=$(ip route | grep ^default)
			echo dns=$(cat /etc/resolv.conf)
			echo clock=$(date +%s)`)) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
			facts[k] = v
		}
		if facts["hostname"] != "ws-"+w.ID || facts["file"] != "ws-"+w.ID || facts["hostname"] != w.Hostname {
			t.Errorf("%s has the host name %q, in /etc/hostname %q", w.Name, facts["hostname"], facts["file"])
		}
		if facts["mac"] != w.MAC || facts["address"] != w.Address {
			t.Errorf("%s has MAC %s and address %s, not %s and %s", w.Name, facts["mac"], facts["address"], w.MAC, w.Address)
		}
		if facts["route"] != "" || facts["dns"] != "" {
			t.Errorf("%s has a route %q and name service %q, but no network beyond its own", w.Name, facts["route"], facts["dns"])
		}
		if len(facts["machine-id"]) != 32 {
			t.Errorf("%s has the machine id %q", w.Name, facts["machine-id"])
		}
		clock, err := strconv.ParseInt(facts["clock"], 10, 64)
		if off := time.Since(time.Unix(clock, 0)); err != nil || off.Abs() > 10*time.Second {
			t.Errorf("%s's clock is off by %v (%v)", w.Name, off, err)
		}
		for _, own := range []string{"hostname", "machine-id", "random", "uuid", "mac"} {
			if other := seen[own+facts[own]]; other != "" {
				t.Errorf("%s and %s have the same %s: %s", other, w.Name, own, facts[own])
			}
			seen[own+facts[own]] = w.Name
		}
	}
}

// output runs a command to its end.
func output(t *testing.T, c *client.Client, ref string, o client.ExecOptions, argv ...string) string {
	t.Helper()
	var out bytes.Buffer
	o.Stdout, o.Stderr = &out, &out
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if code, err := c.Exec(ctx, ref, argv, o); code != 0 || err != nil {
		t.Fatalf("%v in %s: code %d, %v\n%s", argv, ref, code, err, out.String())
	}
	return strings.TrimSpace(out.String())
}

// testDefaults checks who runs what where, when nobody says.
func testDefaults(t *testing.T, c *client.Client) {
	const who = `echo $(id -un) $(pwd) $HOME $USER $GREETING`
	for _, x := range []struct {
		ref  string
		o    client.ExecOptions
		want string
	}{
		{"a", client.ExecOptions{}, "root /root /root root hello"},
		{"a", client.ExecOptions{User: "user", Env: map[string]string{"GREETING": "hi"}}, "user /home/user /home/user user hi"},
		{"a", client.ExecOptions{Workdir: "/tmp"}, "root /tmp /root root hello"},
		{"dev", client.ExecOptions{}, "user /home/user /home/user user"},
		{"dev", client.ExecOptions{User: "root"}, "root /home/user /root root"},
		{"dev", client.ExecOptions{Workdir: "/usr/lib"}, "user /usr/lib /home/user user"},
	} {
		if got := output(t, c, x.ref, x.o, "/bin/sh", "-c", who); got != x.want {
			t.Errorf("%s %+v: %q, not %q", x.ref, x.o, got, x.want)
		}
	}
	if got := output(t, c, "dev", client.ExecOptions{}, "python3", "-c", "import os; print(os.getgid(), os.access('/root', os.R_OK))"); got != "1000 False" {
		t.Errorf("the user of dev has the group, and may read /root: %s", got)
	}
}

// testInput sends 8 MiB through a command's standard input and back.
func testInput(t *testing.T, c *client.Client) {
	in := make([]byte, 8<<20)
	fillRandom(in)
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code, err := c.Exec(ctx, "a", []string{"cat"}, client.ExecOptions{Stdin: bytes.NewReader(in), Stdout: &out})
	if code != 0 || err != nil || !bytes.Equal(out.Bytes(), in) {
		t.Errorf("%d bytes of %d came back, code %d, %v", out.Len(), len(in), code, err)
	}
	// A command that reads nothing ends all the same.
	if code, err := c.Exec(ctx, "a", []string{"true"}, client.ExecOptions{Stdin: bytes.NewReader(in)}); code != 0 || err != nil {
		t.Errorf("a command that does not read: code %d, %v", code, err)
	}
}

func fillRandom(b []byte) {
	r := rand.NewChaCha8([32]byte{1, 2, 3})
	_, _ = r.Read(b) // cannot fail
}

// testOrphans checks what becomes of a command's children.
func testOrphans(t *testing.T, c *client.Client) {
	// A child that goes on and holds the pipe does not hold the caller.
	if got := output(t, c, "a", client.ExecOptions{}, "sh", "-c", "sleep 6001 & echo started"); got != "started" {
		t.Errorf("printed %q", got)
	}
	if got := sh(t, c, "a", "pkill() { kill $(pidof sleep); }; ps | grep -c '[s]leep 6001'; pkill"); got != "1" {
		t.Errorf("%s children run on, not 1", got)
	}
	// Neither time nor the caller's end leaves any of the group.
	const family = "sleep 6002 & (sleep 6002; true) & sleep 6002"
	_, err := c.Exec(t.Context(), "a", []string{"sh", "-c", family}, client.ExecOptions{Timeout: time.Second})
	if client.KindOf(err) != client.Timeout {
		t.Errorf("a command that takes too long ends with %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p, err := c.StartProcess(ctx, "a", []string{"sh", "-c", family}, client.ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := p.Wait(); client.KindOf(err) != client.Canceled {
		t.Errorf("a command whose caller goes ends with %v", err)
	}
	h := &testHost{t: t}
	h.eventually("the commands' children to be gone", func() error {
		if left := sh(t, c, "a", "ps | grep '[s]leep 600' || true"); left != "" {
			return errors.New(left)
		}
		return nil
	})
}

// testTerminal runs exec -it on a terminal of our own.
func testTerminal(t *testing.T, h *testHost) {
	cmd := h.cli("exec", "-it", "dev", "--", "bash", "--norc")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		t.Fatal(err)
	}
	screen := newScreen(t, tty)
	defer screen.close(cmd)
	say := func(line, want string) {
		t.Helper()
		if _, err := io.WriteString(tty, line); err != nil {
			t.Fatal(err)
		}
		if err := screen.until(want); err != nil {
			t.Fatalf("%q did not print %q: %v", line, want, err)
		}
	}
	// The shell's own prompt, not the echo of what is typed, holds the answer.
	say("PS1=\"rea\"'dy> '\r", "ready> ")
	say("stty size\r", "24 80\r\n")
	say("tty; echo $TERM\r", "/dev/pts/0\r\nvt100\r\n")
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 40, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	say("until [ \"$(stty size)\" = '40 132' ]; do sleep 0.1; done; echo now $((40 + 132))\r", "now 172\r\n")
	// It has the terminal once it speaks; before that ctrl-c would be the shell's.
	say("sh -c 'echo on$((1 + 1)); exec sleep 600'\r", "on2\r\n")
	say("\x03", "^C\r\n") // ctrl-c goes to the command, and ends that alone
	say("", "ready> ")
	say("exit 7\r", "exit\r\n")
	if err := cmd.Wait(); exitCode(err) != 7 {
		t.Errorf("left with %v, not 7", err)
	}
}

// screen collects what a terminal shows.
type screen struct {
	t    *testing.T
	tty  io.ReadCloser
	came chan []byte
	seen []byte
	from int // what until has not yet looked at
}

func newScreen(t *testing.T, tty io.ReadCloser) *screen {
	s := &screen{t: t, tty: tty, came: make(chan []byte)}
	go func() {
		defer close(s.came)
		for {
			b := make([]byte, 4096)
			n, err := tty.Read(b)
			if n > 0 {
				s.came <- b[:n]
			}
			if err != nil {
				return
			}
		}
	}()
	return s
}

// until waits until the screen shows want, behind what was found before.
func (s *screen) until(want string) error {
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	for {
		if i := bytes.Index(s.seen[s.from:], []byte(want)); i >= 0 {
			s.from += i + len(want)
			return nil
		}
		select {
		case b, ok := <-s.came:
			if !ok {
				return io.ErrUnexpectedEOF
			}
			s.seen = append(s.seen, b...)
		case <-limit.C:
			return context.DeadlineExceeded
		}
	}
}

// close ends cmd, if it still runs, with its terminal.
func (s *screen) close(cmd *exec.Cmd) {
	_ = cmd.Process.Kill() // may have ended
	s.tty.Close()
	for b := range s.came {
		s.seen = append(s.seen, b...)
	}
	if s.t.Failed() {
		s.t.Logf("the screen:\n%q", s.seen)
	}
}

// testAlone checks that a guest does not reach this host: not what listens on
// its loopback by the gateway's address, and not by the host's own addresses.
func testAlone(t *testing.T, c *client.Client, ref string) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	var reached atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			reached.Add(1)
			conn.Close()
		}
	}()
	defer func() { l.Close(); <-done }()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	// nc itself works:
	sh(t, c, ref, fmt.Sprintf("nc -l -p %s </dev/null & until nc -w 2 127.0.0.1 %s </dev/null; do sleep 0.1; done", port, port))
	hosts := []string{"10.0.2.2", "10.0.2.3"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			hosts = append(hosts, n.IP.String())
		}
	}
	for _, host := range hosts {
		out := sh(t, c, ref, fmt.Sprintf("nc -w 2 %s %s </dev/null >/dev/null 2>&1 && echo reached || echo not", host, port))
		if out != "not" {
			t.Errorf("the guest reaches %s: %s", host, out)
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d connections from the guest came to this host", n)
	}
}

// testFlood lets a command print a gibibyte to a reader who does not read for
// a while: the command waits, and neither daemon nor agent keep what nobody
// has read.
func testFlood(t *testing.T, h *testHost, c *client.Client) {
	const size = 1 << 30
	const slack = 64 << 20 // what a daemon may grow by, in bytes
	pid := h.proc.Process.Pid
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0o200); err != nil {
		t.Skipf("missing capability: peak memory of processes: %v", err)
	}
	before := peak(t, pid)
	out := &gate{opened: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	p, err := c.StartProcess(ctx, "a", []string{"dd", "if=/dev/zero", "bs=64k", "count=" + strconv.Itoa(size>>16)}, client.ExecOptions{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		code, err := p.Wait()
		if err == nil && code != 0 {
			err = fmt.Errorf("code %d", code)
		}
		ended <- err
	}()
	var last string
	h.eventually("the command to be held up", func() error {
		// State and time in the kernel and outside of it (proc(5)).
		now := sh(t, c, "a", fmt.Sprintf("cut -d ' ' -f 3,14,15 /proc/%d/stat", p.PID))
		defer func() { last = now }()
		if now != last || !strings.HasPrefix(now, "S ") {
			return fmt.Errorf("it runs: %s, %s", last, now)
		}
		return nil
	})
	if s, err := c.Stats(ctx, "a"); err != nil || s.AgentRSSBytes > slack {
		t.Errorf("the agent holds %+v, %v", s, err)
	}
	close(out.opened)
	if err := <-ended; err != nil || out.n != size || out.odd {
		t.Errorf("%d bytes of %d came, all zero: %v; %v", out.n, size, !out.odd, err)
	}
	if after := peak(t, pid); after-before > slack {
		t.Errorf("the daemon grew from %d to %d bytes", before, after)
	}
	if s, err := c.Stats(ctx, "a"); err != nil || s.AgentRSSBytes > slack {
		t.Errorf("the agent holds %+v, %v", s, err)
	}
}

// gate takes nothing until it is opened, then counts zeros.
type gate struct {
	opened chan struct{}
	n      int64
	odd    bool
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.opened
	g.odd = g.odd || len(bytes.Trim(p, "\x00")) > 0
	g.n += int64(len(p))
	return len(p), nil
}

// peak is the most memory, in bytes, that a process has held since its mark
// was reset (proc(5), VmHWM).
func peak(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib int64
			if _, err := fmt.Sscanf(rest, "%d kB", &kib); err == nil {
				return kib << 10
			}
		}
	}
	t.Fatalf("no VmHWM in\n%s", b)
	return 0
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
