package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

func TestHostKVM(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "kvm")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if v := hostKVM(filepath.Join(dir, "none"), 0); v.Accel != TCG || !strings.Contains(v.Reason, "there is no") || v.Next == "" {
		t.Errorf("no device: %+v", v)
	}
	if v := hostKVM(file, 0); v.Accel != TCG || !strings.Contains(v.Reason, "does not speak") {
		t.Errorf("a plain file: %+v", v)
	}
	if os.Geteuid() != 0 {
		if err := os.Chmod(file, 0); err != nil {
			t.Fatal(err)
		}
		if v := hostKVM(file, 0); v.Accel != TCG || !strings.Contains(v.Next, "usermod -aG kvm") {
			t.Errorf("no permission: %+v", v)
		}
	}
}

func TestDeviceGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	file := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		mode   os.FileMode
		gid    int
		groups int
		may    bool
	}{
		{"debian", 0o660, 104, 1, true},
		{"open to all", 0o666, 104, 0, true},
		{"root's group", 0o660, 0, 0, false},
		{"root alone", 0o600, 104, 0, false},
		{"read only", 0o640, 104, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := errors.Join(os.Chmod(file, tt.mode), os.Chown(file, 0, tt.gid)); err != nil {
				t.Fatal(err)
			}
			st, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			if g := kvmGroups(file); len(g) != tt.groups || mayOpen(st, 4242) != tt.may {
				t.Errorf("groups %v, may open %v", g, mayOpen(st, 4242))
			}
		})
	}
}

func TestVerdictsOutliveDaemon(t *testing.T) {
	w := newWorld(t, nil)
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []Verdict{
		{Accel: KVM, Kernel: "k1", QEMU: "q", BootID: boot},
		{Accel: KVM, Kernel: "k2", QEMU: "q", BootID: boot},
		{Accel: TCG, Kernel: "k2", QEMU: "q", BootID: boot, Reason: "later"},
		{Accel: KVM, Kernel: "k3", QEMU: "q", BootID: "another"},
		{Accel: "hax", Kernel: "k4", QEMU: "q", BootID: boot},
	} {
		if err := w.accel.remember(v); err != nil {
			t.Fatal(err)
		}
	}
	w.restart()
	if got := w.Verdicts(); len(got) != 2 || got[1].Reason != "later" {
		t.Errorf("verdicts %+v", got)
	}
	if _, ok := w.accel.recall("k3", "q"); ok {
		t.Error("a verdict of another boot counts")
	}
	if err := w.ForgetVerdicts(); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if got := w.Verdicts(); len(got) != 0 {
		t.Errorf("forgotten, but %+v", got)
	}
	if err := os.WriteFile(w.accel.path, []byte("[{"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if got := w.Verdicts(); len(got) != 0 {
		t.Errorf("damaged, but %+v", got)
	}
	if err := w.ForgetVerdicts(); err != nil {
		t.Fatal(err)
	}
}

// TestProbe runs the probe itself, on the stand-in.
func TestProbe(t *testing.T) {
	var tries atomic.Int32
	var ready func(context.Context, domain.Endpoint) error
	w := newWorld(t, func(o *Options) {
		o.Accel = "auto"
		o.probeLimit = 2 * time.Second
		o.Ready = func(ctx context.Context, ep domain.Endpoint) error {
			tries.Add(1)
			return ready(ctx, ep)
		}
	})
	probed := func(kernel string) (Verdict, error) {
		s := w.spec("one")
		s.Boot.Kernel.Digest = kernel
		return w.probed(t.Context(), s)
	}
	ready = func(ctx context.Context, ep domain.Endpoint) error {
		return tell(ctx, domain.Process{Endpoint: ep}, "print x")
	}

	var wg sync.WaitGroup
	for range 5 { // one tries, all learn
		wg.Go(func() {
			if v, err := probed("good"); err != nil || v.Accel != KVM {
				t.Errorf("got %+v, %v", v, err)
			}
		})
	}
	wg.Wait()
	if n := tries.Load(); n != 1 {
		t.Errorf("tried %d times", n)
	}

	ready = func(ctx context.Context, _ domain.Endpoint) error { <-ctx.Done(); return ctx.Err() }
	if v, err := probed("hangs"); err != nil || v.Accel != TCG || v.Reason != "a guest under KVM did not answer within 2s" || v.Next == "" {
		t.Errorf("a guest that hangs: %+v, %v", v, err)
	}
	ready = func(ctx context.Context, ep domain.Endpoint) error {
		_ = tell(ctx, domain.Process{Endpoint: ep}, "shutdown guest-reset")
		<-ctx.Done()
		return ctx.Err()
	}
	if v, err := probed("dies"); err != nil || v.Accel != TCG || v.Reason != errGuestEnded.Error() {
		t.Errorf("a guest that dies: %+v, %v", v, err)
	}
	ready = func(context.Context, domain.Endpoint) error { return errors.New("wrong protocol") }
	if v, err := probed("lies"); err != nil || v.Accel != TCG || v.Reason != "wrong protocol" {
		t.Errorf("an agent that is none: %+v, %v", v, err)
	}
	if v, ok := w.accel.recall("hangs", w.binary.known.Key()); !ok || v.Accel != TCG {
		t.Errorf("not remembered: %+v", v)
	}

	s := w.spec("one")
	s.Boot.Kernel.Digest, s.Boot.Append = "disk", "fake=refuse"
	if v, err := w.probed(t.Context(), s); !fault.Is(err, fault.Missing) {
		t.Errorf("what is not KVM's fault: %+v, %v", v, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready = func(ctx context.Context, _ domain.Endpoint) error { cancel(); <-ctx.Done(); return ctx.Err() }
	s.Boot.Kernel.Digest, s.Boot.Append = "canceled", ""
	if v, err := w.probed(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who left: %+v, %v", v, err)
	}
	if left, err := listUnder(w.probesDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestProbeSwept: a daemon that was killed during a probe leaves it running.
func TestProbeSwept(t *testing.T) {
	w := newWorld(t, nil)
	build, err := w.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := w.launch(t.Context(), build, w.spec("p1"), Launch{RunDir: string(w.probeDir("p1")), Accel: TCG})
	if err != nil {
		t.Fatal(err)
	}
	w.restart()
	if alive(r.process.PID) {
		t.Error("the probe's process lives")
	}
	r.qmp.Close()
	r.console.Close()
	r.handle.close()
}

func TestAccelForced(t *testing.T) {
	if _, err := NewOwner(Options{RunDir: "/r", ConsoleDir: "/r", Accel: "hvf"}); err == nil {
		t.Error("an unknown accelerator was taken")
	}
	w := newWorld(t, func(o *Options) { o.Accel = "auto" })
	s := w.spec("one")
	s.AccelForce = TCG
	if v, err := w.Accel(t.Context(), s); err != nil || v.Accel != TCG {
		t.Errorf("%+v, %v", v, err)
	}
	s.AccelForce = ""
	if v, err := w.Accel(t.Context(), s); err != nil || v.Accel != TCG || v.Reason == "" {
		t.Errorf("without a probe: %+v, %v", v, err)
	}
	if n := EffectiveCPUs(TCG, 4); n != 1 {
		t.Errorf("%d vCPUs under TCG", n)
	}
	if n := EffectiveCPUs(KVM, 4); n != 4 {
		t.Errorf("%d vCPUs under KVM", n)
	}
}
