package files

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

type entry struct {
	tar.Header
	text string
}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.Size = int64(len(e.text))
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (w *world) unpack(user, dir string, body []byte) reply {
	return w.do(call{"POST", "/files/archive", q("path", dir, "username", user), nil, bytes.NewReader(body)})
}

// shape describes a tree: what an archive has to carry over.
func shape(t *testing.T, root string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		s := fmt.Sprintf("%v %d", fi.Mode(), fi.Sys().(*syscall.Stat_t).Uid)
		switch {
		case fi.Mode()&os.ModeSymlink != 0:
			text, _ := os.Readlink(p)
			s += " -> " + text
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %d %d %.10q links %d", fi.ModTime().Unix(), len(b), b, fi.Sys().(*syscall.Stat_t).Nlink)
		default:
			s += fmt.Sprint(" ", fi.ModTime().Unix())
		}
		m[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestArchiveRoundTrip(t *testing.T) {
	w := newWorld(t)
	src := filepath.Join(w.home, "src")
	long := strings.Repeat("long-", 30) + "name"
	for name, text := range map[string]string{
		"a.txt": "A", "empty": "", "sub/deep/" + long: "x", "run.sh": "#!", "big": string(pattern(3*bufferBytes + 1)), "sub/ünï": "u",
	} {
		w.put("alice/src/"+name, text, 0o644, aliceID)
	}
	w.must(os.Chmod(src+"/run.sh", 0o755|os.ModeSetgid))
	w.must(os.MkdirAll(src+"/ro/emptydir", 0o755))
	w.must(os.Link(src+"/a.txt", src+"/sub/hard"))
	w.must(os.Symlink("../a.txt", src+"/sub/soft"))
	w.must(os.Symlink("/nowhere", src+"/dangling"))
	w.must(filepath.WalkDir(src, func(p string, _ os.DirEntry, _ error) error { return os.Lchown(p, aliceID, aliceID) }))
	w.must(os.Chmod(src+"/run.sh", 0o755|os.ModeSetgid))
	w.must(os.Chmod(src+"/ro", 0o555))
	when := time.Unix(1_600_000_000, 0)
	for _, p := range []string{"a.txt", "sub/deep", "sub", "ro", "."} {
		w.must(os.Chtimes(filepath.Join(src, p), when, when))
	}
	want := shape(t, src)
	w.must(unix.Mkfifo(src+"/fifo", 0o600))
	w.must(os.Chtimes(src, when, when))

	for _, user := range []string{"alice", "root"} {
		r := w.do(call{"GET", "/files/archive", q("path", src, "username", user), nil, nil})
		w.want(r, 200)
		if got := r.Trailer.Get(archiveError); got != "" {
			t.Fatalf("trailer %q", got)
		}
		dst := filepath.Join(w.home, "new", "dst-"+user)
		up := w.unpack(user, dst, []byte(r.text))
		w.want(up, 200)
		var ans unpacked
		w.must(json.Unmarshal([]byte(up.text), &ans))
		if ans.Path != dst || ans.Entries != len(want) {
			t.Errorf("answer %+v, want %d entries", ans, len(want))
		}
		if diff := cmp.Diff(want, shape(t, dst)); diff != "" {
			t.Errorf("%s: %s", user, diff)
		}
	}
	// gzip is for callers with a slow way to the host
	r := w.do(call{"POST", "/files/archive", q("path", "gz"), map[string]string{"Content-Encoding": "gzip"},
		bytes.NewReader(zipped(archive(t, entry{tar.Header{Name: "f"}, "text"})))})
	w.want(r, 200)
	if got := w.get(w.home + "/gz/f"); got != "text" {
		t.Errorf("got %q", got)
	}
}

func TestArchiveOfOne(t *testing.T) {
	w := newWorld(t)
	w.put("alice/f", "text", 0o640, aliceID)
	w.must(os.Symlink("f", w.home+"/l"))
	for name, kind := range map[string]byte{"f": tar.TypeReg, "l": tar.TypeSymlink} {
		r := w.do(call{"GET", "/files/archive", q("path", name), nil, nil})
		w.want(r, 200)
		tr := tar.NewReader(strings.NewReader(r.text))
		h, err := tr.Next()
		w.must(err)
		if h.Name != name || h.Typeflag != kind || h.Uname != "" {
			t.Errorf("header %+v", h)
		}
		if _, err := tr.Next(); !errors.Is(err, io.EOF) {
			t.Errorf("after one entry: %v", err)
		}
	}
}

func TestArchiveErrors(t *testing.T) {
	w := newWorld(t)
	w.put("alice/d/a", "A", 0o644, aliceID)
	w.put("alice/d/locked", "x", 0o600, bobID)
	w.put("bob/closed/x", "x", 0o600, bobID)
	w.must(os.Chmod(filepath.Join(w.dir, "bob/closed"), 0o700))
	get := func(p, user string) reply {
		return w.do(call{"GET", "/files/archive", q("path", p, "username", user), nil, nil})
	}
	w.want(get("none", ""), 404)
	w.want(get("d/a/below", ""), 404)
	w.want(get("../bob/closed", ""), 403)
	w.want(get("d", "eve"), 401)
	w.want(get("d\x00", ""), 400)
	r := get("d", "")
	w.want(r, 200)
	if got := r.Trailer.Get(archiveError); !strings.Contains(got, "permission denied") {
		t.Errorf("trailer %q, want the reason", got)
	}
	tr := tar.NewReader(strings.NewReader(r.text))
	var err error
	for err == nil {
		_, err = tr.Next()
		if err == nil {
			_, err = io.Copy(io.Discard, tr)
		}
	}
	// Readers tell a missing end only by the missing blocks.
	if strings.HasSuffix(r.text, strings.Repeat("\x00", 1024)) {
		t.Error("the archive has an end")
	}
}

func TestUnpackRefuses(t *testing.T) {
	w := newWorld(t)
	outside := w.put("outside/victim", "untouched", 0o666, aliceID)
	dirOutside := filepath.Dir(outside)
	w.must(os.Chown(dirOutside, aliceID, aliceID))
	w.put("alice/dst/file", "kept", 0o644, aliceID)
	w.put("alice/dst/dir/in", "kept", 0o644, aliceID)
	w.must(os.Symlink(dirOutside, w.home+"/dst/out"))
	w.must(filepath.WalkDir(w.home+"/dst", func(p string, _ os.DirEntry, _ error) error { return os.Lchown(p, aliceID, aliceID) }))
	link := func(name, to string) entry {
		return entry{tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}, ""}
	}
	hard := func(name, to string) entry {
		return entry{tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeLink}, ""}
	}
	file := func(name string) entry { return entry{tar.Header{Name: name}, "evil"} }
	dir := func(name string) entry { return entry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""} }
	cases := map[string][]entry{
		"absolute":               {file(outside)},
		"dotdot":                 {file("../outside/victim")},
		"dotdot inside":          {file("a/../../x")},
		"dotdot that stays":      {dir("a"), file("a/../x")},
		"through a link":         {file("out/victim")},
		"through a new link":     {link("l", dirOutside), file("l/victim")},
		"through a chain":        {link("l1", dirOutside), link("l2", "l1"), file("l2/victim")},
		"dotdot link":            {link("l", "../.."), file("l/outside/victim")},
		"hard link out":          {hard("h", "../../outside/victim")},
		"hard link absolute":     {hard("h", outside)},
		"hard link through link": {link("l", dirOutside), hard("h", "l/victim")},
		"hard link to nothing":   {hard("h", "nothing")},
		"hard link to itself":    {file("h"), hard("h", "./h")},
		"directory by a link":    {dir("out/new")},
		"mkdir over link":        {dir("out")},
		"device":                 {{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""}},
		"fifo":                   {{tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, ""}},
		"file over directory":    {file("dir")},
		"directory over file":    {dir("file")},
		"the directory itself":   {file(".")},
		"long name":              {file(strings.Repeat("n", 300))},
	}
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		t.Run(name, func(t *testing.T) { w.at(t).want(w.unpack("", "dst", archive(t, cases[name]...)), 400) })
	}
	w.want(w.unpack("", "dst", archive(t, file("file/x"))), 409)
	if got := w.get(outside); got != "untouched" {
		t.Errorf("the file outside holds %q", got)
	}
	if names, err := readNames(dirOutside, 10); err != nil || len(names) != 1 {
		t.Errorf("outside: %v, %v", names, err)
	}
	if w.get(w.home+"/dst/dir/in") != "kept" {
		t.Error("a directory was replaced")
	}

	// Sparse records promise more than they bring.
	w.want(w.unpack("", "sp", pax(t, "VENDOR.other.key", "1")), 200)
	w.want(w.unpack("", "sp", pax(t, "GNU.sparse.major", "1")), 400)
	w.want(w.unpack("", "sp", bytes.Repeat([]byte("junk"), 1024)), 400)
	good := archive(t, entry{tar.Header{Name: "cut"}, strings.Repeat("x", 10_000)})
	w.want(w.unpack("", "sp", good[:5000]), 400)
	w.gone(w.home + "/sp/cut")
	w.want(w.unpack("", "dst/file", good), 400)
	w.want(w.unpack("", "", good), 400)
	w.want(w.unpack("", "../bob/x", good), 403)
	w.want(w.unpack("eve", "x", good), 401)
}

// pax is an archive with one PAX record for one empty file.
func pax(t *testing.T, key, value string) []byte {
	t.Helper()
	rec := key + "=" + value + "\n"
	n := len(rec) + 3
	rec = fmt.Sprintf("%d %s", n, rec)
	if len(rec) != n {
		t.Fatalf("record %q has %d bytes", rec, len(rec))
	}
	x := archive(t, entry{tar.Header{Name: "px"}, rec})
	x[156] = 'x'
	sum := 0
	copy(x[148:156], "        ")
	for _, c := range x[:512] {
		sum += int(c)
	}
	copy(x[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return append(x[:1024], archive(t, entry{tar.Header{Name: "s"}, ""})...)
}

func TestUnpackReplaces(t *testing.T) {
	w := newWorld(t)
	p := w.put("alice/dst/f", "old", 0o600, aliceID)
	w.must(os.Link(p, w.home+"/other"))
	w.must(os.Symlink("../victim", w.home+"/dst/l"))
	w.put("alice/victim", "kept", 0o644, aliceID)
	w.must(os.Mkdir(w.home+"/dst/d", 0o700))
	w.must(filepath.WalkDir(w.home, func(p string, _ os.DirEntry, _ error) error { return os.Lchown(p, aliceID, aliceID) }))
	body := archive(t,
		entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o711, ModTime: time.Unix(1, 0)}, ""},
		entry{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o711}, ""},
		entry{tar.Header{Name: "f", Mode: 0o755}, "new"},
		entry{tar.Header{Name: "l", Uid: 0, Gid: 0}, "now a file"},
		entry{tar.Header{Name: "unnamed/parent/f"}, "x"})
	w.want(w.unpack("alice", "dst", body), 200)
	if w.get(p) != "new" || w.get(w.home+"/other") != "old" || w.get(w.home+"/victim") != "kept" || w.get(w.home+"/dst/l") != "now a file" {
		t.Error("contents are wrong")
	}
	if uid, mode := w.owner(w.home + "/dst/l"); uid != aliceID || mode != 0o644 {
		t.Errorf("owner %d, mode %v", uid, mode)
	}
	for dir, want := range map[string]os.FileMode{"dst": 0o755, "dst/d": 0o700, "dst/unnamed/parent": 0o755} {
		if _, mode := w.owner(filepath.Join(w.home, dir)); mode.Perm() != want {
			t.Errorf("%s: mode %v, want %v", dir, mode, want)
		}
	}
	// root keeps the owners of the archive
	w.want(w.unpack("root", w.home+"/r", archive(t, entry{tar.Header{Name: "f", Uid: bobID, Gid: bobID}, "x"})), 200)
	if uid, _ := w.owner(w.home + "/r/f"); uid != bobID {
		t.Errorf("owner %d, want %d", uid, bobID)
	}
}
