//go:build vm

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/qemu/qmp"
)

// testKernel finds a kernel with everything built in that boots without ACPI:
// AGENTISO_TEST_KERNEL or dist/test/vmlinux of this module.
func testKernel(t *testing.T) string {
	t.Helper()
	path := os.Getenv("AGENTISO_TEST_KERNEL")
	if path == "" {
		path = filepath.Join("..", "..", "dist", "test", "vmlinux")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("missing capability: a test kernel (AGENTISO_TEST_KERNEL): %v", err)
	}
	return path
}

// testInitrd builds testdata/guest into an initrd, once.
var testInitrd = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "qi")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", bin, "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build guest: %w: %s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	entry := func(name string, mode, major, minor int, data []byte) { // newc
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	entry("dev", 0o040755, 0, 0, nil)
	entry("dev/console", 0o020600, 5, 1, nil)
	entry("init", 0o100755, 0, 0, program)
	entry("TRAILER!!!", 0, 0, 0, nil)
	return b.Bytes(), nil
})

// vmWorld is a world with the host's QEMU.
func vmWorld(t *testing.T, edit func(*Options)) *world {
	t.Helper()
	testKernel(t)
	if _, err := exec.LookPath(defaultBinary); err != nil {
		t.Skip("missing capability: " + defaultBinary)
	}
	return newWorld(t, func(o *Options) {
		o.Binary = ""
		if edit != nil {
			edit(o)
		}
	})
}

// vmSpec is a machine that boots the test's guest from files of its own.
func (w *world) vmSpec(id string) domain.MachineSpec {
	w.t.Helper()
	initrd, err := testInitrd()
	if err != nil {
		w.t.Fatal(err)
	}
	s := plainSpec()
	s.ID = id
	s.MemoryMiB = 128
	s.CPUs = 1
	s.Boot = domain.Boot{Kernel: domain.Kernel{Path: testKernel(w.t), PVH: true}, Initrd: filepath.Join(w.dir, "initrd")}
	s.Disk = domain.Disk{Path: filepath.Join(w.dir, id+",disk"), Format: domain.Raw}
	// Never written twice: QEMU maps it, and would not survive its being cut.
	if _, err := os.Stat(s.Boot.Initrd); err != nil {
		if err := os.WriteFile(s.Boot.Initrd, initrd, 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	w.sparse(s.Disk.Path)
	return s
}

func (w *world) sparse(path string) {
	w.t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		err = errors.Join(f.Truncate(64<<20), f.Close())
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// boot starts a machine and waits until its guest obeys.
func (w *world) boot(s domain.MachineSpec) domain.Process {
	w.t.Helper()
	began := time.Now()
	p := w.start(s)
	started := time.Since(began)
	w.awaitGuest(p)
	w.t.Logf("%s: started in %v, obeys after %v", s.ID, started.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	return p
}

func (w *world) awaitGuest(p domain.Process) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 60*time.Second)
	defer cancel()
	if err := guestReady(ctx, p.Endpoint); err != nil {
		w.t.Fatalf("guest: %v\n%s\n%s", err, w.Tail(filepath.Base(p.RunDir), 4096), runDir(p.RunDir).lastWords())
	}
}

// guestReady is what the link's readiness check is in the daemon.
func guestReady(ctx context.Context, ep domain.Endpoint) error {
	for {
		try, cancel := context.WithTimeout(ctx, time.Second) // a line sent too early is lost
		err := tell(try, domain.Process{Endpoint: ep}, "ping")
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (w *world) awaitConsole(id, text string) {
	w.t.Helper()
	w.await(fmt.Sprintf("%q on the console", text), func() bool { return bytes.Contains(w.Tail(id, 1<<20), []byte(text)) })
}

// TestVMBoot: the console has the kernel's first line, devices come in the
// promised order, emulation has one vCPU, and the guest's end is understood.
func TestVMBoot(t *testing.T) {
	w := vmWorld(t, nil)
	s := w.vmSpec("one")
	s.CPUs = 4
	s.Boot.Append = "loglevel=7"
	p := w.boot(s)
	if out := w.Tail("one", 1<<20); !bytes.HasPrefix(out, []byte("[    0.000000] Linux version ")) {
		t.Errorf("the console begins with %.100q", out)
	}
	w.tell(p, "cpus")
	w.awaitConsole("one", "qtest: cpus 0\r\n")
	w.tell(p, "devices")
	w.awaitConsole("one", "qtest: device virtio0 0x0003\r\nqtest: device virtio1 0x0002\r\nqtest: device virtio2 0x0001\r\n")
	status, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/status")
	if err != nil || !bytes.Contains(status, []byte("Seccomp:\t2\n")) || !bytes.Contains(status, []byte("NoNewPrivs:\t1\n")) {
		t.Errorf("sandbox: %v\n%s", err, status)
	}
	w.tell(p, "reboot")
	if e := w.awaitExit("one"); e.Reason != "guest shut down" {
		t.Errorf("exit %v", e)
	}
}

func TestVMAdopt(t *testing.T) {
	w := vmWorld(t, nil)
	p := w.boot(w.vmSpec("one"))
	w.restart()
	// Nobody reads the console now; the guest must not wait for it.
	w.tell(p, "flood")
	w.tell(p, "ping")
	if err := w.Adopt(t.Context(), "one", p); err != nil {
		t.Fatal(err)
	}
	w.await("the console's connection", func() bool {
		w.tell(p, "say")
		return bytes.Contains(w.Tail("one", 1<<20), []byte("qtest: said"))
	})
	w.tell(p, "panic")
	e := w.awaitExit("one")
	if !strings.HasPrefix(e.Reason, "guest kernel panic: Attempted to kill init! exitcode=0x00000300") {
		t.Errorf("exit %q", e.Reason)
	}
}

func TestVMKilled(t *testing.T) {
	w := vmWorld(t, nil)
	p := w.boot(w.vmSpec("one"))
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := w.awaitExit("one"); !strings.HasPrefix(e.Reason, "QEMU was killed by signal 9") {
		t.Errorf("exit %q", e.Reason)
	}
	if err := w.Kill(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
}

// TestVMConsole: a guest that floods its console with whatever bytes fills two
// files and no more, and is not held up.
func TestVMConsole(t *testing.T) {
	w := vmWorld(t, func(o *Options) { o.consoleLimit = 64 << 10 })
	p := w.boot(w.vmSpec("one"))
	w.tell(p, "hostile")
	w.awaitConsole("one", "\x00\x1b]0;owned\x07\x1b[2J\xff\xfe\r\r\r\n\x1b[31mredqtest: was hostile")
	w.tell(p, "flood")
	w.awaitConsole("one", "qtest: flooded")
	var kept int64
	files, err := filepath.Glob(filepath.Join(w.opts.ConsoleDir, "*"))
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		kept += st.Size()
	}
	if err != nil || len(files) != 2 || kept > 128<<10 || kept < 64<<10 {
		t.Errorf("%d bytes in %v, %v", kept, files, err)
	}
	w.tell(p, "ping")
}

func TestVMRefused(t *testing.T) {
	w := vmWorld(t, nil)
	one := w.vmSpec("one")
	tests := []struct {
		name string
		edit func(*domain.MachineSpec)
		kind fault.Kind
		want string
	}{
		{"no disk", func(s *domain.MachineSpec) { s.Disk.Path = "/no/such,disk" }, fault.Missing, "'/no/such,disk'"},
		{"no kernel", func(s *domain.MachineSpec) { s.Boot.Kernel.Path = "/no/such/kernel" }, fault.Missing, "/no/such/kernel"},
		{"not qcow2", func(s *domain.MachineSpec) { s.Disk.Format = domain.QCOW2 }, fault.BootFailed, "not in qcow2 format"},
		{"memory", func(s *domain.MachineSpec) { s.MemoryMiB = 1 << 36 }, fault.NoSpace, "Cannot allocate memory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := one
			tt.edit(&s)
			_, err := w.Start(t.Context(), s)
			if !fault.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) || fault.As(err).Next == "" {
				t.Errorf("got %v, kind %s", err, fault.As(err).Kind)
			}
			t.Log(err)
		})
	}
	t.Run("disk in use", func(t *testing.T) {
		w.start(one)
		two := one
		two.ID = "two"
		if _, err := w.Start(t.Context(), two); !fault.Is(err, fault.InUse) {
			t.Errorf("got %v", err)
		}
	})
}

func TestVMNothingLeaks(t *testing.T) {
	w := vmWorld(t, nil)
	s := w.vmSpec("one")
	w.start(s)
	if err := w.Kill(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	for range 20 {
		p := w.start(s)
		if err := w.Kill(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
		if alive(p.PID) {
			t.Fatal("alive")
		}
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d files open, %d before", after, before)
	}
	if left, err := w.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestVMUser: as an unprivileged user, with user networking as the driver
// describes it.
func TestVMUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	w := vmWorld(t, nil)
	s := w.vmSpec("one")
	s.UID = 54321
	s.Slot.Restrict = false
	s.Slot.Address = netip.MustParsePrefix("10.0.2.15/24")
	s.Slot.Gateway = netip.MustParseAddr("10.0.2.2")
	s.Slot.DNS = []netip.Addr{netip.MustParseAddr("10.0.2.3")}
	_, err := w.Start(t.Context(), s)
	if f := fault.As(err); f.Kind != fault.Missing || !strings.Contains(f.Next, "uid 54321") {
		t.Errorf("files out of reach: %v; next: %s", err, f.Next)
	}
	if err := errors.Join(os.Chmod(w.dir, 0o711), os.Chown(s.Disk.Path, s.UID, s.UID)); err != nil {
		t.Fatal(err)
	}
	p := w.boot(s)
	st, err := os.Stat("/proc/" + strconv.Itoa(p.PID))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 54321 {
		t.Errorf("process belongs to %+v, %v", st, err)
	}
}

func TestVMBridge(t *testing.T) {
	w := vmWorld(t, nil)
	tap, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("missing capability: /dev/net/tun: %v", err)
	}
	defer tap.Close()
	ifr, err := unix.NewIfreq("qtest%d")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(int(tap.Fd()), unix.TUNSETIFF, ifr); err != nil {
		t.Skipf("missing capability: TAP interfaces: %v", err)
	}
	name := ifr.Name()
	s := w.vmSpec("one")
	s.Slot = domain.NetworkSlot{Driver: "bridge", MAC: s.Slot.MAC, TAP: name}
	if _, err := w.Start(t.Context(), s); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("a TAP that another holds: %v", err)
	}
	persist := func(on int) {
		if err := unix.IoctlSetInt(int(tap.Fd()), unix.TUNSETPERSIST, on); err != nil {
			t.Fatal(err)
		}
	}
	persist(1)
	tap.Close()
	t.Cleanup(func() {
		if tap, err := openTAP(name); err == nil {
			_ = unix.IoctlSetInt(int(tap.Fd()), unix.TUNSETPERSIST, 0)
			tap.Close()
		}
	})
	w.boot(s)
	if err := w.Kill(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	s.Slot.TAP = "qtest-none"
	if _, err := w.Start(t.Context(), s); err == nil || !strings.Contains(err.Error(), "qtest-none") {
		t.Errorf("a TAP that is not there: %v", err)
	}
}

// TestVMFullDisk: the guest waits while the host's disk is full, and goes on
// without harm when there is room.
func TestVMFullDisk(t *testing.T) {
	w := vmWorld(t, func(o *Options) { o.resumeEvery = 200 * time.Millisecond })
	small := filepath.Join(w.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("missing capability: mounting: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	s := w.vmSpec("one")
	s.Disk.Path = filepath.Join(small, "disk")
	w.sparse(s.Disk.Path)
	p := w.boot(s)
	w.tell(p, "fill")
	w.await("the guest's being held", func() bool { return w.Paused("one") != "" })
	if err := unix.Mount("small", small, "tmpfs", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	w.awaitConsole("one", "qtest: filled <nil>")
	w.await("its being let go", func() bool { return w.Paused("one") == "" })
	b, err := os.ReadFile(s.Disk.Path)
	if err != nil || !bytes.Equal(b[:4<<20], bytes.Repeat([]byte("full"), 1<<20)) {
		t.Errorf("disk: %v", err)
	}
}

// TestVMProbe decides on this host's KVM with a real guest.
func TestVMProbe(t *testing.T) {
	w := vmWorld(t, func(o *Options) { o.Accel = "auto"; o.Ready = guestReady })
	if v := hostKVM(kvmDevice, 0); v.Accel != KVM {
		t.Skip("missing capability: /dev/kvm: " + v.Reason)
	}
	s := w.vmSpec("one")
	began := time.Now()
	v, err := w.Accel(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v after %v", v, time.Since(began))
	if v.Accel == TCG && v.Next == "" {
		t.Error("no advice")
	}
	if left, err := listUnder(w.probesDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	p := w.boot(s)
	if p.Accel != v.Accel {
		t.Errorf("machine has %s, verdict %s", p.Accel, v.Accel)
	}
	w.tell(p, "reboot")
	w.awaitExit("one")
}

// TestVMProbeHangs: where KVM starts a guest and then hangs, the verdict comes
// at the limit and the process is gone. On the host where this was met QEMU
// gets that far only without one of the CPU's features.
func TestVMProbeHangs(t *testing.T) {
	w := vmWorld(t, func(o *Options) { o.Accel = "auto"; o.Ready = guestReady })
	if v := hostKVM(kvmDevice, 0); v.Accel != KVM {
		t.Skip("missing capability: /dev/kvm: " + v.Reason)
	}
	wrapper := filepath.Join(w.dir, "qemu")
	if err := os.WriteFile(wrapper, []byte("#!/bin/sh\nexec /usr/bin/"+defaultBinary+" \"$@\" -cpu host,arch-capabilities=off\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.binary.name = wrapper
	v, err := w.Accel(t.Context(), w.vmSpec("one"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", v)
	again, err := w.Accel(t.Context(), w.vmSpec("one"))
	if diff := cmp.Diff(v, again); err != nil || diff != "" {
		t.Errorf("asked again: %v (-first +second):\n%s", err, diff)
	}
	if left, err := listUnder(w.probesDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestVMScratch: what the guest of a probe writes goes nowhere.
func TestVMScratch(t *testing.T) {
	w := vmWorld(t, nil)
	build, err := w.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := w.vmSpec("one")
	r, err := w.launch(t.Context(), build, s, Launch{RunDir: string(w.probeDir("one")), Accel: TCG, Scratch: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.discard(); err != nil {
			t.Error(err)
		}
	}()
	if err := awaitReady(t.Context(), r, guestReady); err != nil {
		t.Fatal(err)
	}
	w.tell(r.process, "fill")
	w.tell(r.process, "ping") // obeyed in turn: filled by now
	if b, err := os.ReadFile(s.Disk.Path); err != nil || bytes.ContainsAny(b[:4<<20], "ful") {
		t.Errorf("the disk was written to, %v", err)
	}
}

// TestVMMonitor speaks with a QEMU that has no machine.
func TestVMMonitor(t *testing.T) {
	w := vmWorld(t, nil)
	p := w.start(w.vmSpec("one"))
	w.Close()
	w.Owner = w.open()
	c, err := qmp.Dial(t.Context(), filepath.Join(p.RunDir, qmpSocket), qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v := c.Version(); v.Major < minMajor {
		t.Errorf("version %+v", v)
	}
	err = c.Do(t.Context(), "no-such-command", nil, nil)
	if e, ok := errors.AsType[*qmp.Error](err); !ok || e.Class != "CommandNotFound" {
		t.Errorf("got %v", err)
	}
	var schema json.RawMessage // the longest answer there is
	if err := c.Do(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) > qmp.DefaultMaxLine/2 {
		t.Errorf("schema of %d bytes, %v", len(schema), err)
	}
	events := c.Subscribe(4, "SHUTDOWN")
	if err := c.Do(t.Context(), "quit", nil, nil); err != nil {
		t.Error(err)
	}
	if e := <-events.Events(); !bytes.Contains(e.Data, []byte("host-qmp-quit")) {
		t.Errorf("event %s %s", e.Name, e.Data)
	}
	<-c.Done()
}
