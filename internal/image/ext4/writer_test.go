package ext4

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// need skips the test unless the host has all programs; they only check what
// this package writes.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("missing capability: %s (package e2fsprogs)", p)
		}
	}
}

func disk(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func finish(t testing.TB, w *Writer) Stats {
	t.Helper()
	st, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// fsck fails the test unless e2fsck finds nothing at all to mend.
func fsck(t testing.TB, f *os.File) {
	t.Helper()
	need(t, "e2fsck")
	out, err := exec.Command("e2fsck", "-fn", f.Name()).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

func debugfs(t testing.TB, f *os.File, command string) string {
	t.Helper()
	need(t, "debugfs")
	cmd := exec.Command("debugfs", "-R", command, f.Name())
	cmd.Env = append(os.Environ(), "DEBUGFS_PAGER=cat", "TZ=UTC")
	var errb bytes.Buffer
	cmd.Stderr = &errb
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v\n%s", command, err, errb.String())
	}
	return string(out)
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func text(w *Writer, name, s string, a Attr) error {
	return w.File(name, a, int64(len(s)), strings.NewReader(s))
}

var day = time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)

func TestEmpty(t *testing.T) {
	f := disk(t)
	st := finish(t, New(f, Options{Label: "agentiso"}))
	if st.SizeBytes%groupBytes != 0 || st.SizeBytes < 64<<20 {
		t.Errorf("size %d", st.SizeBytes)
	}
	fsck(t, f)
}

func TestEverythingIsKept(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	a := Attr{Mode: 0o644, UID: 70000, GID: 80000, ModTime: day}
	must(t,
		w.Mkdir("/", Attr{Mode: 0o755, ModTime: day}),
		w.Mkdir("tmp", Attr{Mode: 0o1777, ModTime: day}),
		text(w, "./etc/passwd", "root:x:0:0::/root:/bin/sh\n", a),
		text(w, "usr/bin/sudo", "#!", Attr{Mode: 0o4755, ModTime: day}),
		text(w, "usr/bin/wall", "#!", Attr{Mode: 0o2755, ModTime: day}),
		text(w, "empty", "", a),
		w.Link("etc/passwd-", "/etc/passwd"),
		w.Symlink("bin", "usr/bin", Attr{ModTime: day}),
		text(w, "bin/true", "in usr/bin", a),
		w.Symlink("long", strings.Repeat("x", 300), Attr{UID: 1, GID: 2, ModTime: day}),
		w.Special("dev/null", CharDevice, 1, 3, Attr{Mode: 0o666}),
		w.Special("dev/big", BlockDevice, 259, 70000, Attr{Mode: 0o660, GID: 6}),
		w.Special("run/fifo", FIFO, 0, 0, Attr{Mode: 0o600}),
		text(w, "ping", "x", Attr{Mode: 0o755, Xattrs: map[string][]byte{
			"security.capability": {1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
			"user.a":              []byte("1"), "com.apple.provenance": []byte("dropped"),
		}}),
		text(w, "many", "x", Attr{Mode: 0o755, Xattrs: map[string][]byte{
			"user.large": bytes.Repeat([]byte("v"), 3000), "user.empty": nil, "trusted.t": []byte("t"),
			aclAccess: append(le32(2), 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xE8, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
				0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255, 255, 255),
		}}),
		text(w, "odd \" name\nwith 2 lines", "x", a),
		text(w, strings.Repeat("n", 255), "x", a),
	)
	finish(t, w)
	fsck(t, f)

	for file, want := range map[string][]string{
		"/tmp":          {"Mode:  01777", "Type: directory"},
		"/etc/passwd":   {"User: 70000", "Group: 80000", "Links: 2", "Size: 26", "mtime: 0x6638820a", "-- Mon May  6 07:08:10 2024"},
		"/usr/bin/sudo": {"Mode:  04755"},
		"/usr/bin/wall": {"Mode:  02755"},
		"/usr/bin/true": {"Size: 10"},
		"/bin":          {`Fast link dest: "usr/bin"`},
		"/long":         {"Type: symlink", "Size: 300", "User:     1"},
		"/dev/null":     {"Device major/minor number: 01:03", "Mode:  0666"},
		"/dev/big":      {"(New-style) Device major/minor number: 259:70000"},
		"/run/fifo":     {"Type: FIFO"},
	} {
		out := debugfs(t, f, "stat "+file)
		for _, s := range want {
			if s == "mtime: 0x6638820a" || strings.HasPrefix(s, "-- Mon") {
				s = strings.NewReplacer("6638820a", fmt.Sprintf("%08x", day.Unix()), "07:08:10", "07:08:09").Replace(s)
			}
			if !strings.Contains(out, s) {
				t.Errorf("%s: no %q in\n%s", file, s, out)
			}
		}
	}
	if got := debugfs(t, f, "cat /etc/passwd-"); got != "root:x:0:0::/root:/bin/sh\n" {
		t.Errorf("hard link reads %q", got)
	}
	for file, want := range map[string][]string{
		"/ping": {"security.capability (20)", `user.a (1) = "1"`},
		"/many": {"user.large (3000)", "user.empty (0)", "trusted.t (1)", "system.posix_acl_access"},
	} {
		out := debugfs(t, f, "ea_list "+file)
		for _, s := range want {
			if !strings.Contains(out, s) {
				t.Errorf("%s: no %q in %s", file, s, out)
			}
		}
		if strings.Contains(out, "apple") {
			t.Errorf("%s keeps a foreign attribute", file)
		}
	}
}

// TestLarge makes files that need every depth of the extent tree, cross
// superblock copies, and have holes; and directories of many blocks.
func TestLarge(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	r := rand.NewChaCha8([32]byte{1})
	sums := map[string][32]byte{}
	put := func(name string, parts ...*io.LimitedReader) {
		h, size := sha256.New(), int64(0)
		var rs []io.Reader
		for _, p := range parts {
			rs, size = append(rs, p), size+p.N
		}
		must(t, w.File(name, Attr{Mode: 0o600}, size, io.TeeReader(io.MultiReader(rs...), h)))
		sums[name] = [32]byte(h.Sum(nil))
	}
	zeros := func(n int64) *io.LimitedReader { return &io.LimitedReader{R: zeroReader{}, N: n} }
	random := func(n int64) *io.LimitedReader { return &io.LimitedReader{R: r, N: n} }
	put("plain", random(150<<20+17))
	put("hole", random(5), zeros(3<<20), random(9000), zeros(2<<20))
	put("short-hole", random(5), zeros(100<<10), random(9000), zeros(5000))
	put("zeros", zeros(3<<20+1))
	var many []*io.LimitedReader
	for range 400 {
		many = append(many, random(4096), zeros(1<<20))
	}
	put("two-levels", many...)
	for i := range 3000 {
		must(t, text(w, fmt.Sprintf("dir/a-file-with-quite-a-long-name-%d", i), "x", Attr{Mode: 0o644}))
	}
	st := finish(t, w)
	fsck(t, f)
	for name, sum := range sums {
		out := filepath.Join(t.TempDir(), "out")
		debugfs(t, f, "dump /"+name+" "+out)
		b, err := os.Open(out)
		must(t, err)
		h := sha256.New()
		_, err = io.Copy(h, b)
		must(t, err, b.Close())
		if [32]byte(h.Sum(nil)) != sum {
			t.Errorf("%s reads back differently", name)
		}
	}
	if got := strings.Count(debugfs(t, f, "ls -p /dir"), "a-file-with"); got != 3000 {
		t.Errorf("directory lists %d of 3000", got)
	}
	if st.ContentBytes > 240<<20 {
		t.Errorf("holes take room: content is %d bytes", st.ContentBytes)
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestManyInodesPerGroup(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	for i := range 30000 {
		must(t, text(w, fmt.Sprintf("d%d/%d", i%100, i), "", Attr{Mode: 0o644}))
	}
	finish(t, w)
	fsck(t, f)
}

// TestManyGroups needs several blocks of descriptors.
func TestManyGroups(t *testing.T) {
	f := disk(t)
	w := New(f, Options{FreeBytes: 100 << 30})
	must(t, text(w, "a", "x", Attr{Mode: 0o644}))
	if st := finish(t, w); st.SizeBytes < 100<<30 || st.ContentBytes > 4<<30 {
		t.Errorf("%+v", st)
	}
	fsck(t, f)
}

func TestManySubdirectories(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	for i := range maxLinks {
		must(t, w.Mkdir(fmt.Sprintf("d/%d", i), Attr{Mode: 0o755}))
	}
	finish(t, w)
	fsck(t, f)
}

func TestLayers(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	big := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // 4 MiB
	must(t,
		w.File("big", Attr{}, int64(len(big)), bytes.NewReader(big)),
		text(w, "a", "lower a", Attr{}), w.Link("b", "a"),
		text(w, "opaque/lower", "x", Attr{}), text(w, "opaque/sub/lower", "x", Attr{}), text(w, "opaque/both/lower", "x", Attr{}),
		text(w, "gone/x/y", "x", Attr{}),
		text(w, "file", "x", Attr{}), text(w, "dir/x", "x", Attr{}),
	)
	w.NextLayer()
	must(t,
		text(w, "a", "upper a", Attr{}), // b keeps the lower content
		w.Link("c", "b"),                // across layers
		text(w, "opaque/upper", "x", Attr{}), text(w, "opaque/both/upper", "x", Attr{}),
		w.ClearLower("opaque"),
		text(w, "opaque/later", "x", Attr{}),
		w.Remove("gone"), w.Remove("not/there"), w.Remove("file/below"), w.Remove("big"), w.Remove("/"),
		w.Mkdir("file", Attr{Mode: 0o755}), text(w, "dir", "x", Attr{}),
		w.File("reused", Attr{}, int64(len(big)), bytes.NewReader(big)),
	)
	st := finish(t, w)
	fsck(t, f)
	got := map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		got[name] = debugfs(t, f, "cat /"+name)
	}
	if diff := cmp.Diff(map[string]string{"a": "upper a", "b": "lower a", "c": "lower a"}, got); diff != "" {
		t.Error(diff)
	}
	for dir, want := range map[string]string{
		"/":            ". .. a b c dir file lost+found opaque reused",
		"/opaque":      ". .. both later upper",
		"/opaque/both": ". .. upper",
		"/file":        ". ..",
	} {
		if got := names(debugfs(t, f, "ls -p "+dir)); got != want {
			t.Errorf("%s holds %q, want %q", dir, got, want)
		}
	}
	if st.ContentBytes > journalBlocks*BlockSize+12<<20 {
		t.Errorf("removed data takes room: content is %d bytes", st.ContentBytes)
	}
}

// names is the sixth column of "ls -p", /inode/mode/uid/gid/name/size/.
func names(ls string) string {
	var ns []string
	for line := range strings.Lines(ls) {
		if c := strings.Split(line, "/"); len(c) > 5 {
			ns = append(ns, c[5])
		}
	}
	return strings.Join(ns, " ")
}

func TestSameInputSameBytes(t *testing.T) {
	var sums [2][]byte
	for i := range sums {
		f := disk(t)
		w := New(f, Options{})
		for k := range 200 {
			must(t, text(w, fmt.Sprintf("d%d/f%d", k%7, k), strings.Repeat("x", k*100), Attr{Mode: 0o644, ModTime: day,
				Xattrs: map[string][]byte{"user.a": []byte("1"), "user.b": []byte("2"), "user.c": nil}}))
		}
		must(t, w.Remove("d3"))
		finish(t, w)
		h := sha256.New()
		_, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40))
		must(t, err)
		sums[i] = h.Sum(nil)
	}
	if !bytes.Equal(sums[0], sums[1]) {
		t.Error("two builds of one tree differ")
	}
}

func TestHostileNames(t *testing.T) {
	deep := strings.Repeat("d/", maxDepth/2)
	for _, tc := range []struct {
		name string
		do   func(*Writer) error
		want error
	}{
		{"dot dot", func(w *Writer) error { return text(w, "../x", "", Attr{}) }, ErrEscape},
		{"dot dot inside", func(w *Writer) error { return text(w, "a/../../x", "", Attr{}) }, ErrEscape},
		{"dot dot in a link", func(w *Writer) error { return w.Link("x", "../../etc/shadow") }, ErrEscape},
		{"link to nothing", func(w *Writer) error { return w.Link("x", "y") }, ErrNotFound},
		{"link to itself", func(w *Writer) error { return w.Link("x", "x") }, ErrNotFound},
		{"link to a directory", func(w *Writer) error { return w.Link("x", "/") }, ErrLinkDir},
		{"long name", func(w *Writer) error { return text(w, strings.Repeat("n", 256), "", Attr{}) }, ErrName},
		{"long path", func(w *Writer) error { return text(w, strings.Repeat("n/", 2049), "", Attr{}) }, ErrName},
		{"NUL", func(w *Writer) error { return text(w, "a\x00b", "", Attr{}) }, ErrName},
		{"root as file", func(w *Writer) error { return text(w, "./", "", Attr{}) }, ErrIsRoot},
		{"below a file", func(w *Writer) error { text(w, "f", "", Attr{}); return text(w, "f/g", "", Attr{}) }, ErrNotDir},
		{"symlink loop", func(w *Writer) error {
			w.Symlink("a", "b", Attr{})
			w.Symlink("b", "a", Attr{})
			return text(w, "a/x", "", Attr{})
		}, ErrLoop},
		{"symlink to a long name", func(w *Writer) error {
			w.Symlink("a", strings.Repeat("n", 300), Attr{})
			return text(w, "a/x", "", Attr{})
		}, ErrName},
		{"deeper than paths go", func(w *Writer) error {
			w.Symlink("s", deep, Attr{})
			w.Symlink("s/t", deep, Attr{})
			return text(w, "s/t/y/x", "", Attr{})
		}, ErrName},
		{"attributes", func(w *Writer) error {
			return text(w, "f", "", Attr{Xattrs: map[string][]byte{"user.x": make([]byte, 5000)}})
		}, ErrAttribute},
		{"short file", func(w *Writer) error { return w.File("f", Attr{}, 10, strings.NewReader("x")) }, io.ErrUnexpectedEOF},
		{"too much", func(w *Writer) error { return w.File("f", Attr{}, 1<<62, zeroReader{}) }, ErrTooLarge},
		{"too many", func(w *Writer) error {
			w.opt.MaxFiles = 2
			return text(w, "a/b/c", "", Attr{})
		}, ErrTooMany},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.do(New(disk(t), Options{})); !errors.Is(err, tc.want) {
				t.Errorf("error is %v, want %v", err, tc.want)
			}
		})
	}
}

// TestLinksStayInside has names that look as if they led out, and do not.
func TestLinksStayInside(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	must(t,
		text(w, "/abs", "x", Attr{}),
		w.Symlink("out", "../../../../tmp", Attr{}), text(w, "out/x", "inside", Attr{}),
		w.Symlink("up/abs", "/etc", Attr{}), text(w, "up/abs/y", "inside", Attr{}),
		text(w, "d/f", "x", Attr{}), w.Link("d", "d/f"), // the link replaces its own target's parent
	)
	finish(t, w)
	fsck(t, f)
	for _, name := range []string{"/tmp/x", "/etc/y"} {
		if got := debugfs(t, f, "cat "+name); got != "inside" {
			t.Errorf("%s reads %q", name, got)
		}
	}
	if got := debugfs(t, f, "cat /d"); got != "x" {
		t.Errorf("the link reads %q", got)
	}
}
