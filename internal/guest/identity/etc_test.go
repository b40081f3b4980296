package identity

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func testRoot(t *testing.T) (*root, string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r, dir
}

// TestReplaceHostile puts everything in the file's place that a user could.
func TestReplaceHostile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	outside := filepath.Join(t.TempDir(), "outside")
	tests := map[string]func(dir string) error{
		"nothing":       func(string) error { return nil },
		"file":          func(d string) error { return os.WriteFile(d+"/etc/f", []byte("old"), 0o777) },
		"dangling link": func(d string) error { return os.Symlink("../run/systemd/resolve/stub-resolv.conf", d+"/etc/f") },
		"link outside":  func(d string) error { return os.Symlink(outside, d+"/etc/f") },
		"loop":          func(d string) error { return os.Symlink("f", d+"/etc/f") },
		"fifo":          func(d string) error { return unix.Mkfifo(d+"/etc/f", 0o666) },
		"device":        func(d string) error { return unix.Mknod(d+"/etc/f", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) },
		"temporary link": func(d string) error {
			return os.Symlink(outside, d+"/etc/.agentiso-f")
		},
		"hard link": func(d string) error {
			if err := os.WriteFile(d+"/precious", []byte("new\n"), 0o644); err != nil {
				return err
			}
			return os.Link(d+"/precious", d+"/etc/f")
		},
		"no directory": func(d string) error { return os.Remove(d + "/etc") },
		"linked directory": func(d string) error {
			// An absolute link means the guest's root, not the host's.
			return errors.Join(os.Remove(d+"/etc"), os.Mkdir(d+"/real", 0o755), os.Symlink("/real", d+"/etc"))
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			r, dir := testRoot(t)
			if err := prepare(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(outside, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := r.replace("etc/f", []byte("new\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			where := dir + "/etc/f"
			if name == "linked directory" {
				where = dir + "/real/f"
			}
			st, err := os.Lstat(where)
			if err != nil || !st.Mode().IsRegular() || st.Mode().Perm() != 0o644 {
				t.Fatalf("%v, %v", st, err)
			}
			if b, _ := os.ReadFile(where); string(b) != "new\n" {
				t.Errorf("content %q", b)
			}
			if b, _ := os.ReadFile(outside); string(b) != "precious" {
				t.Errorf("wrote outside: %q", b)
			}
			if _, err := os.Lstat(filepath.Dir(where) + "/.agentiso-f"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("temporary file is left: %v", err)
			}
		})
	}
	t.Run("directory", func(t *testing.T) {
		r, dir := testRoot(t)
		if err := os.MkdirAll(dir+"/etc/f/x", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := r.replace("etc/f", []byte("new\n"), 0o644); err == nil || !strings.Contains(err.Error(), "replace /etc/f: ") {
			t.Errorf("error %v", err)
		}
		if _, err := os.Lstat(dir + "/etc/.agentiso-f"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("temporary file is left: %v", err)
		}
	})
	t.Run("escape", func(t *testing.T) {
		r, dir := testRoot(t)
		if err := errors.Join(os.Remove(dir+"/etc"), os.Symlink("../../../../../../../../tmp", dir+"/etc")); err != nil {
			t.Fatal(err)
		}
		// Within the root that is /tmp, which it does not have.
		if err := r.replace("etc/f", []byte("new\n"), 0o644); err == nil {
			t.Error("no error")
		}
		if _, err := os.Lstat("/tmp/f"); err == nil {
			t.Error("wrote outside")
		}
	})
}

func TestReplaceLeavesTheSameAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	r, dir := testRoot(t)
	inode := func() uint64 {
		t.Helper()
		if err := r.replace("etc/f", []byte("x\n"), 0o444); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(dir+"/etc/f", &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	if a, b := inode(), inode(); a != b {
		t.Errorf("written again: inode %d, then %d", a, b)
	}
}

func TestReadHostile(t *testing.T) {
	r, dir := testRoot(t)
	if b, err := r.read("etc/hosts", 10); b != nil || err != nil {
		t.Errorf("absent: %q, %v", b, err)
	}
	if err := unix.Mkfifo(dir+"/etc/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := r.read("etc/fifo", 10); err == nil {
		t.Error("a FIFO was read")
	}
	if err := os.WriteFile(dir+"/etc/big", make([]byte, 11), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := r.read("etc/big", 10); err == nil {
		t.Error("too large a file was read")
	}
	if err := os.Symlink("/etc/passwd", dir+"/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	if b, err := r.read("etc/passwd", 1<<20); b != nil || err != nil {
		t.Errorf("a link led out: %q, %v", b, err)
	}
}
