package users

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	alice = User{Name: "alice", UID: 60001, GID: 60001, Groups: []uint32{60100}}
	bob   = User{Name: "bob", UID: 60002, GID: 60002}
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
}

// open is a directory that everybody can reach, as t.TempDir is not.
func open(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "users")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDoKernelDecides(t *testing.T) {
	needRoot(t)
	dir := open(t)
	write := func(name string, mode os.FileMode, uid, gid int) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chown(p, uid, gid), os.Chmod(p, mode)); err != nil {
			t.Fatal(err)
		}
		return p
	}
	private := write("private", 0o600, 60001, 60001)
	shared := write("shared", 0o640, 0, 60100)
	public := write("public", 0o644, 0, 0)
	sticky := filepath.Join(dir, "sticky")
	if err := errors.Join(os.Mkdir(sticky, 0o777), os.Chmod(sticky, 0o777|os.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	kept := write("sticky/kept", 0o666, 60001, 60001)
	read := func(p string) func() error {
		return func() error { _, err := os.ReadFile(p); return err }
	}
	tests := []struct {
		name string
		user User
		do   func() error
		want error
	}{
		{"own file", alice, read(private), nil},
		{"another's file", bob, read(private), fs.ErrPermission},
		{"by group", alice, read(shared), nil},
		{"not of the group", bob, read(shared), fs.ErrPermission},
		{"public", bob, read(public), nil},
		{"write public", bob, func() error { return os.WriteFile(public, nil, 0) }, fs.ErrPermission},
		{"chown", alice, func() error { return os.Chown(private, 60002, 60002) }, fs.ErrPermission},
		{"chmod another's", bob, func() error { return os.Chmod(private, 0o777) }, fs.ErrPermission},
		{"device", alice, func() error { return unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, 1<<8|3) }, fs.ErrPermission},
		{"trusted attribute", alice, func() error { return unix.Setxattr(private, "trusted.x", []byte("x"), 0) }, fs.ErrPermission},
		{"remove from sticky", bob, func() error { return os.Remove(kept) }, fs.ErrPermission},
		{"remove own from sticky", alice, func() error { return os.Remove(kept) }, nil},
		{"root", User{Name: "root"}, read(private), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.user.Do(tt.do); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestDoOwnsWhatItMakes(t *testing.T) {
	needRoot(t)
	dir := open(t)
	for _, u := range []User{alice, {Name: "wheel", UID: 0, GID: 60100}} {
		p := filepath.Join(dir, u.Name)
		if err := u.Do(func() error { return os.Mkdir(p, 0o755) }); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			t.Fatal(err)
		}
		if st.Uid != u.UID || st.Gid != u.GID {
			t.Errorf("owner %d:%d, want %d:%d", st.Uid, st.Gid, u.UID, u.GID)
		}
	}
}

// TestDoPutsBack checks every thread of the process after many calls at once.
func TestDoPutsBack(t *testing.T) {
	needRoot(t)
	dir := open(t)
	before := threads(t)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			u := []User{alice, bob}[i%2]
			p := filepath.Join(dir, fmt.Sprint(i))
			for range 20 {
				if err := u.Do(func() error { runtime.Gosched(); return os.WriteFile(p, nil, 0o600) }); err != nil {
					t.Error(err)
				}
			}
			var st unix.Stat_t
			if err := unix.Stat(p, &st); err != nil || st.Uid != u.UID {
				t.Errorf("owner %d, %v, want %d", st.Uid, err, u.UID)
			}
		})
	}
	wg.Wait()
	for id := range threads(t) {
		if !before[id] {
			t.Errorf("a thread was left as %s", id)
		}
	}
}

// threads collects the distinct identities of the process's threads.
func threads(t *testing.T) map[string]bool {
	t.Helper()
	ids := map[string]bool{}
	files, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		id := ""
		for _, line := range splitLines(b) {
			for _, key := range []string{"Uid:", "Gid:", "Groups:", "CapEff:"} {
				if len(line) > len(key) && string(line[:len(key)]) == key {
					id += string(line) + " "
				}
			}
		}
		ids[id] = true
	}
	return ids
}

func TestDoEndsOfFunction(t *testing.T) {
	needRoot(t)
	t.Run("error", func(t *testing.T) {
		want := errors.New("mine")
		if err := alice.Do(func() error { return want }); err != want {
			t.Errorf("error %v, want %v", err, want)
		}
	})
	t.Run("panic", func(t *testing.T) {
		defer func() {
			if v := recover(); v != "mine" {
				t.Errorf("recovered %v, want mine", v)
			}
		}()
		_ = alice.Do(func() error { panic("mine") })
		t.Error("Do returned after a panic")
	})
	t.Run("goexit", func(t *testing.T) {
		if err := alice.Do(func() error { runtime.Goexit(); return nil }); !errors.Is(err, ErrAborted) {
			t.Errorf("error %v, want ErrAborted", err)
		}
	})
	if got := unix.Geteuid(); got != 0 {
		t.Errorf("effective user %d afterwards", got)
	}
	if err := os.WriteFile(filepath.Join(open(t), "x"), nil, 0o600); err != nil {
		t.Error(err)
	}
}

func BenchmarkDo(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("missing capability: root")
	}
	for b.Loop() {
		if err := alice.Do(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
