//go:build host

package identity

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
)

// mountLoop mounts a new ext4 file system of 32 MiB on a loop device of twice
// that.
func mountLoop(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	run := func(argv ...string) string {
		t.Helper()
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Skipf("missing capability: %s: %v: %s", argv[0], err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if err := errors.Join(os.Mkdir(mnt, 0o755), os.WriteFile(img, nil, 0o600), os.Truncate(img, 64<<20)); err != nil {
		t.Fatal(err)
	}
	run("mkfs.ext4", "-q", "-b", "4096", img, "32M")
	loop := run("losetup", "--find", "--show", img)
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", loop).Run() })
	if err := unix.Mount(loop, mnt, "ext4", 0, ""); err != nil {
		t.Skipf("missing capability: mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	return mnt
}

func TestFreezeAndThaw(t *testing.T) {
	mnt := mountLoop(t)
	s, _ := newTest(t, Options{Root: mnt})
	ctx := t.Context()
	quiesce := func(freeze bool, ms uint32) error {
		_, err := s.Quiesce(ctx, connect.NewRequest(&guestv1.QuiesceRequest{Freeze: freeze, TimeoutMs: ms}))
		return err
	}
	thaw := func() bool {
		t.Helper()
		res, err := s.Thaw(ctx, connect.NewRequest(&guestv1.ThawRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg.WasFrozen
	}
	write := func() chan error {
		done := make(chan error, 1)
		go func() { done <- os.WriteFile(mnt+"/f", []byte("x"), 0o600) }()
		return done
	}
	if thaw() {
		t.Error("was frozen before anything")
	}
	if err := quiesce(false, 0); err != nil || s.freezer.frozen() {
		t.Errorf("sync: %v", err)
	}
	if err := errors.Join(quiesce(true, 0), quiesce(true, 60000)); err != nil {
		t.Fatal(err)
	}
	done := write()
	select {
	case err := <-done:
		t.Errorf("a write went through a freeze: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	_, err := s.Configure(ctx, connect.NewRequest(withoutNetwork()))
	wantError(t, err, connect.CodeFailedPrecondition, "", "frozen")
	if !thaw() || thaw() {
		t.Error("thaw did not tell")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}

	// It ends by itself.
	if err := quiesce(true, 200); err != nil {
		t.Fatal(err)
	}
	if err := <-write(); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(10 * time.Second); s.freezer.frozen(); {
		if time.Now().After(end) {
			t.Fatal("never thawed")
		}
		time.Sleep(time.Millisecond)
	}
	if thaw() {
		t.Error("thaw claims that it had held")
	}

	// Somebody else's freeze is not the host's.
	if err := s.freezer.ioctl(fiFreeze); err != nil {
		t.Fatal(err)
	}
	wantError(t, quiesce(true, 300), connect.CodeFailedPrecondition, "", "frozen already")
	if err := s.freezer.ioctl(fiThaw); err != nil {
		t.Fatal(err)
	}
	// And somebody else's thaw is noticed.
	if err := errors.Join(quiesce(true, 0), s.freezer.ioctl(fiThaw)); err != nil {
		t.Fatal(err)
	}
	if thaw() {
		t.Error("thaw claims that it had held")
	}
	if err := quiesce(true, 60001); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("long limit: %v", err)
	}
}

// TestQuiesceGivenUp stops waiting for a kernel that is busy: what was asked
// for is undone when it comes.
func TestQuiesceGivenUp(t *testing.T) {
	mnt := mountLoop(t)
	s, _ := newTest(t, Options{Root: mnt})
	f := s.freezer
	if err := f.ioctl(fiFreeze); err != nil { // a sync now waits
		t.Fatal(err)
	}
	blocked := make(chan error, 1)
	go func() { blocked <- os.WriteFile(mnt+"/f", []byte("x"), 0o600) }()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := f.quiesce(ctx, true, time.Minute); err == nil {
		t.Error("no error")
	}
	if err := f.ioctl(fiThaw); err != nil {
		t.Fatal(err)
	}
	if err := <-blocked; err != nil {
		t.Error(err)
	}
	// Whoever comes next finds it usable.
	if _, err := f.thaw(t.Context()); err != nil || f.frozen() {
		t.Errorf("frozen %t, %v", f.frozen(), err)
	}
	if err := os.WriteFile(mnt+"/g", []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
}

func TestGrowToDevice(t *testing.T) {
	mnt := mountLoop(t)
	for range 2 { // the second one has nothing to do
		n, err := growToDevice(mnt)
		if errors.Is(err, unix.EPERM) {
			t.Skip("missing capability: CAP_SYS_RESOURCE")
		}
		if err != nil || n != 64<<20 {
			t.Fatalf("%d, %v", n, err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(mnt, &st); err != nil || int64(st.Blocks)*st.Bsize < 48<<20 {
		t.Errorf("%d blocks of %d, %v", st.Blocks, st.Bsize, err)
	}
	if _, err := growToDevice("/proc"); !errors.Is(err, errUnsuitable) {
		t.Errorf("/proc: %v", err)
	}
}
