//go:build vm

package link_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// boot builds program with the go command's arguments, boots the kernel named
// by AGENTISO_TEST_KERNEL with it as the initrd's /init, and returns QEMU's
// end and the paths of the agent's socket and of the console's log. The kernel
// must be a PVH ELF with virtio-console and vsock built in.
func boot(t *testing.T, build ...string) (ended <-chan struct{}, sock, console string) {
	t.Helper()
	kernel := os.Getenv("AGENTISO_TEST_KERNEL")
	if kernel == "" {
		t.Skip("missing capability: AGENTISO_TEST_KERNEL, a guest kernel with virtio-console and vsock built in")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("missing capability: qemu-system-x86_64")
	}
	dir := sockDir(t)
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", append(build[:len(build)-1:len(build)-1], "-o", init, build[len(build)-1])...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, out)
	}
	prog, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, newc(prog), 0o600); err != nil {
		t.Fatal(err)
	}
	sock, console = filepath.Join(dir, "s"), filepath.Join(dir, "console")
	cmd = exec.Command(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "microvm,x-option-roms=off,isa-serial=on,acpi=off,rtc=on,pit=on,pic=on",
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "256",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet no_timer_check panic=-1",
		"-serial", "file:"+console,
		"-device", "virtio-serial-device",
		"-chardev", "socket,id=c0,path="+sock+",server=on,wait=off",
		"-device", "virtserialport,chardev=c0,name="+wire.PortName)
	var errb bytes.Buffer
	cmd.Stderr = &errb
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if t.Failed() {
			b, _ := os.ReadFile(console)
			t.Logf("console:\n%s\nqemu: %s", b[max(0, len(b)-4096):], errb.String())
		}
	})
	eventually(t, "QEMU's socket", func() bool {
		_, err := os.Stat(sock)
		return err == nil
	})
	return done, sock, console
}

const probe = "github.com/agentiso/agentiso/internal/guest/port/porttest/probe"

func init() { asInit = runAsInit }

// runAsInit is what this test binary does when a guest boots it: it runs the
// vsock test and ends the machine.
func runAsInit(m *testing.M) {
	for _, mnt := range [][2]string{{"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"proc", "/proc"}} {
		if err := os.MkdirAll(mnt[1], 0o755); err != nil {
			fmt.Println(err)
		}
		if err := unix.Mount(mnt[0], mnt[1], mnt[0], 0, ""); err != nil {
			fmt.Println("mount", mnt[1], err)
		}
	}
	os.Args = []string{os.Args[0], "-test.run=^TestVsockInGuest$", "-test.v"}
	code := m.Run()
	fmt.Printf("vsock tests ended with code %d\n", code)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// TestVsockInGuest has both ends on the real vsock of one kernel, over its
// loopback transport (CID 1). Few hosts have that, so that the test boots
// itself in a guest.
func TestVsockInGuest(t *testing.T) {
	if os.Getpid() == 1 {
		vsockLoopback(t)
		return
	}
	ended, _, console := boot(t, "test", "-c", "-tags=vm", ".")
	select {
	case <-ended:
	case <-time.After(3 * time.Minute):
		t.Fatal("the guest does not end")
	}
	b, err := os.ReadFile(console)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("console:\n%s", b)
	if !bytes.Contains(b, []byte("--- PASS: TestVsockInGuest")) || !bytes.Contains(b, []byte("ended with code 0")) {
		t.Error("the test did not pass in the guest")
	}
}

func vsockLoopback(t *testing.T) {
	l, err := port.ListenVsock(t.Context(), port.VsockOptions{AllowLocal: true})
	if err != nil {
		t.Fatal(err)
	}
	serveVsock(t, l)
	h := newHub(t, link.Options{})
	if err := h.Open("w", vsockEndpoint(vsock.Local, 3)); err != nil {
		t.Fatal(err)
	}
	exercise(t, h)
	if err := h.Open("x", vsockEndpoint(vsock.Local, 4)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = get(ctx, h.Transport("x"), "/health")
	wantFault(t, err, fault.Timeout, "the agent closed the connection")
}

// newc is a cpio archive of one executable, /init.
func newc(init []byte) []byte {
	var b bytes.Buffer
	add := func(name string, mode, size int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			b.Len(), mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	for _, dir := range []string{"dev", "proc", "sys", "tmp"} {
		add(dir, 0o40755, 0, nil)
	}
	add("init", 0o100755, len(init), init)
	add("TRAILER!!!", 0, 0, nil)
	return b.Bytes()
}

// TestRealPort runs the link over QEMU's own port. Run with -v it reports
// what it measured; nothing is asserted about that.
func TestRealPort(t *testing.T) {
	_, sock, _ := boot(t, "build", "-ldflags=-s -w", probe)
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()

	began := time.Now()
	resp, err := get(ctx, h.Transport("w"), "/health")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	t.Logf("first answer after %v", time.Since(began))

	d, err := h.Raw(ctx, "w", wire.Echo, 2000)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("raw round trip: %v", d/2000)

	report := func(what string, n int, f func() error) {
		t.Helper()
		var ds []time.Duration
		for range n {
			began := time.Now()
			if err := f(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			ds = append(ds, time.Since(began))
		}
		slices.Sort(ds)
		t.Logf("%s: p50 %v, p90 %v, max %v", what, ds[n/2], ds[n*9/10], ds[n-1])
	}
	health := func() error {
		resp, err := get(ctx, h.Transport("w"), "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	report("call", 300, health)

	// The host is noisy: compare what was measured next to each other.
	const bulk = 64 << 20
	raw := func(m wire.Mode) func() error {
		return func() error {
			_, err := h.Raw(ctx, "w", m, bulk)
			return err
		}
	}
	cases := []struct {
		name string
		run  func() error
		took []time.Duration
	}{
		{name: "raw from guest", run: raw(wire.Source)},
		{name: "download, writes of 32 KiB", run: download(ctx, h, bulk, 32<<10)},
		{name: "download, writes of 256 KiB", run: download(ctx, h, bulk, 256<<10)},
		{name: "raw to guest", run: raw(wire.Sink)},
		{name: "upload", run: upload(ctx, h, bulk)},
	}
	for range 7 {
		for i := range cases {
			began := time.Now()
			if err := cases[i].run(); err != nil {
				t.Fatalf("%s: %v", cases[i].name, err)
			}
			cases[i].took = append(cases[i].took, time.Since(began))
		}
	}
	for _, c := range cases {
		slices.Sort(c.took)
		t.Logf("%s: p50 %.0f MB/s, best %.0f MB/s", c.name, bulk/1e6/c.took[len(c.took)/2].Seconds(), bulk/1e6/c.took[0].Seconds())
	}
	report("suspend, resume, call", 100, func() error {
		if err := h.Suspend(ctx, "w"); err != nil {
			return err
		}
		h.Resume("w")
		return health()
	})

	// Hosts that vanish in the middle of traffic both ways, and come back at
	// once. Odd ones do not even wait for their transfers to start.
	report("reconnect under traffic", 100, reconnecter(ctx, t, h))
	eventually(t, "the guest's goroutines to end", func() bool {
		resp, err := get(ctx, h.Transport("w"), "/goroutines")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		var n int
		fmt.Sscan(string(b), &n)
		return n > 0 && n < 15
	})
}

func download(ctx context.Context, h *link.Hub, n, piece int) func() error {
	return func() error {
		resp, err := get(ctx, h.Transport("w"), fmt.Sprintf("/download?n=%d&piece=%d", n, piece))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, 256<<10))
		if err == nil && got != int64(n) {
			err = fmt.Errorf("got %d bytes of %d", got, n)
		}
		return err
	}
}

func upload(ctx context.Context, h *link.Hub, n int64) func() error {
	return func() error {
		req, err := http.NewRequestWithContext(ctx, "POST", "http://agent/upload", io.LimitReader(zeros{}, n))
		if err != nil {
			return err
		}
		req.ContentLength = n
		resp, err := h.Transport("w").RoundTrip(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && string(b) != fmt.Sprint(n) {
			err = fmt.Errorf("the guest got %s bytes of %d", b, n)
		}
		return err
	}
}

// reconnecter returns a function that makes a call over a fresh connection
// after another one has been cut off in the middle of transfers.
func reconnecter(ctx context.Context, t *testing.T, h *link.Hub) func() error {
	round := 0
	return func() error {
		round++
		var wg sync.WaitGroup
		defer wg.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		tr := h.Transport("w")
		started := make(chan struct{}, 2)
		wg.Go(func() {
			defer func() { started <- struct{}{} }()
			resp, err := get(ctx, tr, "/download?n=1000000000&piece=65536")
			if err != nil {
				return
			}
			defer resp.Body.Close()
			started <- struct{}{}
			_, _ = io.Copy(io.Discard, resp.Body)
		})
		wg.Go(func() {
			req, _ := http.NewRequestWithContext(ctx, "POST", "http://agent/upload", zeros{})
			if resp, err := tr.RoundTrip(req); err == nil {
				resp.Body.Close()
			}
		})
		if round%2 == 0 {
			<-started
		}
		now, stop := context.WithCancel(ctx)
		stop()
		if err := h.Suspend(now, "w"); err != nil {
			return err
		}
		h.Resume("w")
		resp, err := get(ctx, tr, "/health")
		if err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNoContent {
			return fmt.Errorf("round %d: status %s", round, resp.Status)
		}
		// Cut what has started since.
		defer h.Resume("w")
		return h.Suspend(now, "w")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
