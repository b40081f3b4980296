package qcow2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/storage"
	"github.com/agentiso/agentiso/internal/storage/storagetest"
)

func openStore(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestContract(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storagetest.Open {
		dir := filepath.Join(t.TempDir(), "disks")
		return func(t *testing.T) storage.Volumes { return openStore(t, dir) }
	})
}

// base makes an image without content.
func base(t testing.TB, dir string) domain.Disk {
	t.Helper()
	d := domain.Disk{Path: filepath.Join(dir, "base.raw"), Format: domain.Raw, SizeBytes: 1 << 20}
	if err := os.WriteFile(d.Path, make([]byte, d.SizeBytes), 0o644); err != nil {
		t.Fatal(err)
	}
	return d
}

// tree lists what lies in a disk's directory, random parts left out.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		n := e.Name()
		if isLayer(n) {
			n = "layer"
		}
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

// TestCrashAtEachStep stops Snapshot, RollBack, RemoveSnapshot and Clone at each
// of their steps, as a crash would, and goes on with a new store.
func TestCrashAtEachStep(t *testing.T) {
	ctx := t.Context()
	ops := map[string]func(*Store) error{
		"snapshot": func(s *Store) error { return s.Snapshot(ctx, "w1", "two") },
		"rollback": func(s *Store) error { return s.RollBack(ctx, "w1", "one") },
		"remove":   func(s *Store) error { return s.RemoveSnapshot(ctx, "w1", "one") },
		"clone":    func(s *Store) error { _, err := s.Clone(ctx, "w1", "one", "c1"); return err },
	}
	for name, op := range ops {
		for at := 0; ; at++ {
			done := false
			t.Run(fmt.Sprint(name, at), func(t *testing.T) {
				tmp := t.TempDir()
				dir := filepath.Join(tmp, "disks")
				s := openStore(t, dir)
				if _, err := s.Create(ctx, "w1", base(t, tmp), 1<<20); err != nil {
					t.Fatal(err)
				}
				if err := s.Snapshot(ctx, "w1", "one"); err != nil {
					t.Fatal(err)
				}
				type crash struct{}
				n := 0
				s.step = func(string) error {
					if n++; n > at {
						panic(crash{}) // nothing of the operation runs on, not even its cleanup
					}
					return nil
				}
				func() {
					defer func() {
						if r := recover(); r != nil && r != any(crash{}) {
							panic(r)
						}
					}()
					if err := op(s); err != nil {
						t.Error(err)
					}
					done = true
				}()

				s = openStore(t, dir)
				snaps, err := s.Snapshots(ctx, "w1")
				if err != nil {
					t.Fatal(err)
				}
				for _, n := range snaps {
					if err := s.RollBack(ctx, "w1", n); err != nil {
						t.Errorf("roll back to %s: %v", n, err)
					}
				}
				if err := s.Own(ctx, "w1", 0); err != nil {
					t.Error(err)
				}
				check(t, filepath.Join(dir, "w1", diskName))
				if _, err := s.Clone(ctx, "w1", "one", "c1"); err != nil && !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.InUse) {
					t.Errorf("clone afterwards: %v", err)
				}
				// Whatever was cut off, removing the names removes the layers.
				for _, n := range []string{"one", "two"} {
					if err := s.RemoveSnapshot(ctx, "w1", n); err != nil {
						t.Error(err)
					}
				}
				want := []string{diskName}
				d, err := s.openDir("w1", false)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				for range layers(d, diskName) {
					want = append(want, "layer")
				}
				if diff := cmp.Diff(want, tree(t, filepath.Join(dir, "w1"))); diff != "" {
					t.Errorf("left in the directory (-want +got):\n%s", diff)
				}
				for _, id := range []string{"w1", "c1"} {
					if err := s.Remove(ctx, id); err != nil {
						t.Error(err)
					}
				}
				if ids, err := s.List(ctx); err != nil || len(ids) != 0 {
					t.Errorf("List: %v, %v", ids, err)
				}
			})
			if done || t.Failed() {
				break
			}
		}
	}
}

// check has QEMU verify a disk and all it stands on.
func check(t *testing.T, path string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("missing capability: qemu-img")
	}
	for _, argv := range [][]string{{"check", path}, {"info", "--backing-chain", path}} {
		if out, err := exec.CommandContext(t.Context(), "qemu-img", argv...).CombinedOutput(); err != nil {
			t.Errorf("qemu-img %v: %v: %s", argv, err, out)
		}
	}
}

// TestForgedDisk: a machine that was taken over has written into its own disk's
// header. Nothing outside its directory is touched, and rolling back heals it.
func TestForgedDisk(t *testing.T) {
	ctx := t.Context()
	tmp := t.TempDir()
	s := openStore(t, filepath.Join(tmp, "disks"))
	victim := filepath.Join(tmp, "victim")
	if err := os.WriteFile(victim, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "w1", base(t, tmp), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(ctx, "w1", "one"); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(tmp, "disks", "w1", diskName)
	forge := func(o Overlay) {
		f, err := os.OpenFile(disk, os.O_RDWR|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := o.WriteTo(f); err != nil {
			t.Fatal(err)
		}
	}
	for _, backing := range []string{victim, diskName, "@one", "layer-none.qcow2", "layer-..qcow2"} {
		forge(Overlay{1 << 20, backing, domain.QCOW2})
		if err := s.RemoveSnapshot(ctx, "w1", "none"); err != nil { // sweeps
			t.Errorf("backing %q: %v", backing, err)
		}
		if err := s.RollBack(ctx, "w1", "one"); err != nil {
			t.Errorf("backing %q: %v", backing, err)
		}
		check(t, disk)
	}
	if err := os.WriteFile(disk, []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(ctx, "w1", "two"); err == nil {
		t.Error("rubbish was snapshotted")
	}
	if err := s.RollBack(ctx, "w1", "one"); err != nil {
		t.Error(err)
	}
	check(t, disk)
	if _, err := os.Stat(victim); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"@one", diskName, "layer"}, tree(t, filepath.Dir(disk))); diff != "" {
		t.Errorf("directory (-want +got):\n%s", diff)
	}
}

func TestOwnedByItsMachine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	ctx := t.Context()
	tmp := t.TempDir()
	s := openStore(t, filepath.Join(tmp, "disks"))
	if _, err := s.Create(ctx, "w1", base(t, tmp), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.Own(ctx, "w1", 5001); err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(ctx, "w1", "one"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(tmp, "disks", "w1")
	want := map[string]string{
		".": "drwx--x--- 0:5001", diskName: "-rw------- 5001:5001", "layer": "-r--r--r-- 0:0",
	}
	got := map[string]string{}
	for _, n := range append([]string{"."}, list(t, dir)...) {
		st, err := os.Lstat(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode()&os.ModeSymlink != 0 {
			continue
		}
		if isLayer(n) {
			n = "layer"
		}
		sys := st.Sys().(*unixStat)
		got[n] = fmt.Sprintf("%s %d:%d", st.Mode(), sys.Uid, sys.Gid)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rights (-want +got):\n%s", diff)
	}
	if err := os.Chmod(tmp, 0o711); err != nil { // as the data directory is
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(tmp), 0o711); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]bool{5001: true, 5002: false} {
		cmd := exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 4k", filepath.Join(dir, diskName))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("missing capability: qemu-io")
		}
		if (err == nil) != want {
			t.Errorf("user %d writes to the disk of 5001, snapshot below: %v: %s", uid, err, out)
		}
	}
	if err := s.Own(ctx, "w1", 0); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory after it was taken back: %v", st.Mode())
	}
}

// TestLinkInPlaceOfDisk: even if a link stood there, it would not be followed.
func TestLinkInPlaceOfDisk(t *testing.T) {
	ctx := t.Context()
	tmp := t.TempDir()
	s := openStore(t, filepath.Join(tmp, "disks"))
	b := base(t, tmp)
	if _, err := s.Create(ctx, "w1", b, 1<<20); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(tmp, "disks", "w1", diskName)
	if err := errors.Join(os.Remove(disk), os.Symlink(b.Path, disk)); err != nil {
		t.Fatal(err)
	}
	if err := s.Own(ctx, "w1", 0); err == nil {
		t.Error("Own followed a link")
	}
	if st, err := os.Stat(b.Path); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("the link's target changed: %v, %v", st.Mode(), err)
	}
}

func TestDepthLimit(t *testing.T) {
	ctx := t.Context()
	tmp := t.TempDir()
	s := openStore(t, filepath.Join(tmp, "disks"))
	s.opt.NoSync = true
	if _, err := s.Create(ctx, "w1", base(t, tmp), 1<<20); err != nil {
		t.Fatal(err)
	}
	var err error
	n := 0
	for ; err == nil && n <= maxDepth; n++ {
		err = s.Snapshot(ctx, "w1", fmt.Sprint("s", n))
	}
	if !fault.Is(err, fault.Limit) || n != maxDepth+1 {
		t.Errorf("snapshot %d: %v, want a fault of kind limit after %d", n, err, maxDepth)
	}
	check(t, filepath.Join(tmp, "disks", "w1", diskName))
}

func TestListIgnoresWhatIsNotOurs(t *testing.T) {
	s := openStore(t, t.TempDir())
	for _, n := range []string{"lost+found", "w1", ".cache"} {
		if err := os.Mkdir(filepath.Join(s.opt.Dir, n), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(s.opt.Dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if ids, err := s.List(t.Context()); err != nil || !slices.Equal(ids, []string{"w1"}) {
		t.Errorf("List: %v, %v; want w1, which a Create that was cut off left", ids, err)
	}
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range es {
		all = append(all, e.Name())
	}
	return all
}

func BenchmarkCreate(b *testing.B) {
	for _, noSync := range []bool{true, false} {
		b.Run(fmt.Sprintf("nosync=%v", noSync), func(b *testing.B) {
			tmp := b.TempDir()
			s := openStore(b, filepath.Join(tmp, "disks"))
			s.opt.NoSync = noSync
			img := base(b, tmp)
			for i := 0; b.Loop(); i++ {
				if _, err := s.Create(b.Context(), fmt.Sprint("w", i), img, 10<<30); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("qemu-img", func(b *testing.B) {
		tmp := b.TempDir()
		img := base(b, tmp)
		for i := 0; b.Loop(); i++ {
			out, err := exec.CommandContext(b.Context(), "qemu-img", "create", "-q", "-f", "qcow2", "-b", img.Path, "-F", "raw",
				filepath.Join(tmp, strings.Repeat("x", 3)+fmt.Sprint(i)), "10G").CombinedOutput()
			if err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		}
	})
}
