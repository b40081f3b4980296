//go:build host

package files

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
)

// small mounts a file system of 1 MiB below alice's home.
func (w *world) small(options string) string {
	w.t.Helper()
	dir := filepath.Join(w.home, "small")
	w.must(os.Mkdir(dir, 0o755))
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		w.t.Skipf("missing capability: mounting a tmpfs (%v)", err)
	}
	w.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	})
	w.must(os.Chown(dir, aliceID, aliceID))
	return dir
}

func chunked(c call) call {
	c.body = struct{ *strings.Reader }{c.body.(*strings.Reader)} // hides the length
	return c
}

func TestDiskFull(t *testing.T) {
	w := newWorld(t)
	dir := w.small("size=1m")
	tooBig := string(pattern(2 << 20))
	fits := string(pattern(600 << 10))

	w.want(w.do(octets("", dir+"/new", tooBig)), 507)
	w.gone(dir + "/new")
	w.want(w.do(chunked(octets("", dir+"/unknown-size", tooBig))), 507)
	w.gone(dir + "/unknown-size")
	w.want(w.form(map[string]string{"path": dir + "/form"}, part{"file", "f", tooBig}), 507)
	w.gone(dir + "/form")
	w.want(w.form(nil, part{"file", dir + "/first", "1"}, part{"file", dir + "/second", tooBig}), 507)
	w.gone(dir + "/second")
	if got := w.get(dir + "/first"); got != "1" {
		t.Errorf("the file before the one too big holds %q", got)
	}

	// What is known not to fit does not cost the old content.
	w.want(w.do(octets("", dir+"/old", fits)), 200)
	w.want(w.do(octets("", dir+"/old", tooBig)), 507)
	if got := w.get(dir + "/old"); got != fits {
		t.Errorf("the old content is gone: %d bytes", len(got))
	}
	// A full disk takes another version of a file.
	w.want(w.do(octets("", dir+"/old", string(pattern(900<<10)))), 200)
	w.want(w.do(chunked(octets("", dir+"/old", tooBig))), 507)
	if got := w.get(dir + "/old"); got != "" {
		t.Errorf("half a file was left: %d bytes", len(got))
	}

	body := archive(t, entry{tar.Header{Name: "ok"}, "x"}, entry{tar.Header{Name: "big"}, tooBig})
	w.want(w.do(call{"POST", "/files/archive", q("path", dir+"/tree"), nil, bytes.NewReader(body)}), 507)
	w.gone(dir + "/tree/big")

	w.put("alice/part0", fits, 0o600, aliceID)
	w.put("alice/part1", fits, 0o600, aliceID)
	w.want(w.compose("", dir+"/whole", "part0", "part1"), 507)
	w.gone(dir + "/whole")
	if w.get(w.home+"/part0") != fits || w.get(w.home+"/part1") != fits {
		t.Error("a source of a composition that failed was changed")
	}
	names, err := readNames(dir, 100)
	w.must(err)
	for _, n := range names {
		if strings.HasPrefix(n, ".agentiso-") {
			t.Errorf("%s was left behind", n)
		}
	}
}

func TestInodesUsedUp(t *testing.T) {
	w := newWorld(t)
	dir := w.small("size=1m,nr_inodes=2")
	w.want(w.do(octets("", dir+"/a", "x")), 200)
	w.want(w.do(octets("", dir+"/b", "x")), 507)
	w.want(w.do(octets("", dir+"/a", "y")), 200)
}

func TestMoveAcross(t *testing.T) {
	w := newWorld(t)
	dir := w.small("size=1m")
	mv := func(src, dst string) error {
		_, err := w.client("alice").Move(t.Context(), connect.NewRequest(&filesystem.MoveRequest{Source: src, Destination: dst}))
		return err
	}
	w.put("alice/d/sub/f", "text", 0o751, aliceID)
	w.must(unix.Setxattr(w.home+"/d/sub/f", "user.e2b.k", []byte("v"), 0))
	w.must(os.Symlink("sub/f", w.home+"/d/l"))
	w.must(unix.Mkfifo(w.home+"/d/fifo", 0o640))
	w.must(filepath.WalkDir(w.home+"/d", func(p string, _ os.DirEntry, _ error) error { return os.Lchown(p, aliceID, aliceID) }))
	want := shape(t, w.home+"/d")
	w.must(mv("d", dir+"/e"))
	got := shape(t, dir+"/e")
	if len(got) != len(want) {
		t.Errorf("moved %v, want %v", got, want)
	}
	for name, s := range want {
		if got[name] != s {
			t.Errorf("%s: %s, want %s", name, got[name], s)
		}
	}
	w.gone(w.home + "/d")

	big := w.put("alice/big", string(pattern(2<<20)), 0o600, aliceID)
	if err := mv("big", dir+"/big"); code(err) != connect.CodeResourceExhausted {
		t.Errorf("move of what does not fit: %v", err)
	}
	w.gone(dir + "/big")
	if fi, err := os.Stat(big); err != nil || fi.Size() != 2<<20 {
		t.Errorf("the source: %v, %v", fi, err)
	}
	w.put("alice/theirs/f", "x", 0o644, bobID)
	if err := mv("theirs/f", dir+"/f"); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("move of what cannot be removed: %v", err)
	}
}

func TestWatchUnmounted(t *testing.T) {
	w := newWorld(t)
	dir := w.small("size=1m")
	p, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: dir})
	w.must(err)
	w.must(unix.Unmount(dir, unix.MNT_DETACH))
	w.must(unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	eventually(t, func() bool { return p.poll() != nil })
	if p.count("remove .") != 1 {
		t.Errorf("events %q", p.got)
	}
}
