package client

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tree describes what is in a directory.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		s := fi.Mode().String()
		if fi.Mode()&fs.ModeSymlink == 0 {
			s += fi.ModTime().UTC().Format(" 2006-01-02T15:04:05")
		} else {
			target, _ := os.Readlink(p)
			s += " " + target
		}
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += " " + string(b)
		}
		m[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func write(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func unpackInto(t *testing.T, dir, single string, made bool, r io.Reader) (Copied, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var c Copied
	u := &unpacker{root: root, dir: dir, single: single, made: made, result: &c}
	return c, u.unpack(r)
}

func TestPackAndUnpackKeepATree(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	write(t, filepath.Join(src, "run.sh"), "#!/bin/sh", 0o755)
	write(t, filepath.Join(src, "sub", "deep", "data"), strings.Repeat("d", 1<<20), 0o640)
	write(t, filepath.Join(src, "ro", "x"), "x", 0o400)
	if err := os.Link(filepath.Join(src, "run.sh"), filepath.Join(src, "sub", "same")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../nowhere", filepath.Join(src, "sub", "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(src, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	for _, p := range []string{"run.sh", "sub/deep/data", "ro/x", "ro", "sub/deep", "sub", "."} {
		if err := os.Chtimes(filepath.Join(src, p), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(src, "ro"), 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(src, "ro"), 0o700); _ = os.Chmod(filepath.Join(dst, "ro"), 0o700) })

	var seen []int64
	var packed Copied
	var b bytes.Buffer
	p := &packer{result: &packed, total: sizeOf(src), progress: func(done, _ int64) { seen = append(seen, done) }}
	if err := p.pack(&b, src, ""); err != nil {
		t.Fatal(err)
	}
	got, err := unpackInto(t, dst, "", true, &b)
	if err != nil {
		t.Fatal(err)
	}
	want := tree(t, src)
	delete(want, "fifo")
	if diff := cmp.Diff(want, tree(t, dst)); diff != "" {
		t.Error(diff)
	}
	if packed.Files != got.Files || len(packed.Skipped) != 1 || got.Bytes != packed.Bytes || seen[len(seen)-1] != packed.Bytes {
		t.Errorf("packed %+v, unpacked %+v, progress to %d", packed, got, seen[len(seen)-1])
	}
	a, err := os.Stat(filepath.Join(dst, "run.sh"))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.Stat(filepath.Join(dst, "sub", "same")); err != nil || !os.SameFile(a, b) {
		t.Errorf("the hard link is lost: %v", err)
	}
}

type entry struct {
	h    tar.Header
	body string
}

func archive(t testing.TB, entries ...entry) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.h.Size = int64(len(e.body))
		if e.h.Mode == 0 {
			e.h.Mode = 0o644
		}
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name}, body}
}

// Whatever a guest sends, nothing outside of the copy changes.
func TestUnpackStaysInside(t *testing.T) {
	for name, entries := range map[string][]entry{
		"dot dot":        {file("../secret", "x")},
		"absolute":       {file("/secret", "x")},
		"through a link": {{tar.Header{Typeflag: tar.TypeSymlink, Name: "out", Linkname: ".."}, ""}, file("out/secret", "x")},
		"through an absolute link": {
			{tar.Header{Typeflag: tar.TypeSymlink, Name: "out", Linkname: "OUTSIDE"}, ""}, file("out/secret", "x"),
		},
		"over a link":      {{tar.Header{Typeflag: tar.TypeSymlink, Name: "f", Linkname: "OUTSIDE/secret"}, ""}, file("f", "x")},
		"hard link out":    {{tar.Header{Typeflag: tar.TypeLink, Name: "f", Linkname: "../secret"}, ""}, file("f", "x")},
		"mode of a link":   {{tar.Header{Typeflag: tar.TypeSymlink, Name: "d", Linkname: "OUTSIDE"}, ""}, {tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o777}, ""}},
		"directory of dot": {{tar.Header{Typeflag: tar.TypeDir, Name: "a/../../b/", Mode: 0o777}, ""}},
		"device":           {{tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}, ""}},
		"fifo":             {{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"}, ""}},
		"set-user-id":      {{tar.Header{Typeflag: tar.TypeReg, Name: "su", Mode: 0o6755}, "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			outside := t.TempDir()
			write(t, filepath.Join(outside, "secret"), "mine", 0o644)
			inside := filepath.Join(outside, "copy")
			if err := os.Mkdir(inside, 0o755); err != nil {
				t.Fatal(err)
			}
			for i := range entries {
				entries[i].h.Linkname = strings.ReplaceAll(entries[i].h.Linkname, "OUTSIDE", outside)
			}
			before, mode := tree(t, outside)["secret"], stat(t, outside)
			_, err := unpackInto(t, inside, "", false, archive(t, entries...))
			t.Log(err)
			if after := tree(t, outside)["secret"]; after != before {
				t.Errorf("the file outside became %q", after)
			}
			if stat(t, outside) != mode {
				t.Error("the directory outside changed its mode")
			}
			for p, s := range tree(t, inside) {
				if strings.ContainsAny(s[:4], "uDpS") {
					t.Errorf("%s is %s", p, s)
				}
			}
			if all, _ := os.ReadDir(outside); len(all) != 2 {
				t.Errorf("outside there is %v", all)
			}
		})
	}
}

func stat(t *testing.T, p string) fs.FileMode {
	t.Helper()
	fi, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Mode()
}

func TestUnpackOneFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := unpackInto(t, dir, "mine", false, archive(t, file("theirs", "new"))); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "mine")); string(b) != "new" {
		t.Errorf("%q", b)
	}
	for name, b := range map[string]*bytes.Buffer{
		"two files": archive(t, file("a", "1"), file("b", "2")),
		"a link":    archive(t, entry{tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/etc/passwd"}, ""}),
		"nothing":   archive(t),
		"cut":       bytes.NewBuffer(archive(t, file("a", strings.Repeat("x", 5000))).Bytes()[:2000]),
		"no tar":    bytes.NewBufferString(strings.Repeat("nonsense", 200)),
	} {
		dir := t.TempDir()
		_, err := unpackInto(t, dir, "mine", false, b)
		if e, ok := errors.AsType[*Error](err); !ok || !e.Guest {
			t.Errorf("%s: %v", name, err)
		}
		if all, _ := os.ReadDir(dir); name != "two files" && len(all) > 0 {
			t.Errorf("%s left %v", name, all)
		}
	}
}

func TestTargets(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "file"), "", 0o600)
	write(t, filepath.Join(dir, "d", "x"), "", 0o600)
	aDir, aFile := &FileInfo{Type: TypeDirectory}, &FileInfo{Type: TypeFile}
	link := &FileInfo{Type: TypeFile, SymlinkTarget: "/real/file"}
	for _, c := range []struct {
		local, remote string
		there         *FileInfo
		wantDir, want string
		fails         bool
	}{
		{"file", "/tmp", aDir, "/tmp", "file", false},
		{"file", "/tmp/", nil, "/tmp/", "file", false},
		{"file", "/tmp/new", nil, "/tmp", "new", false},
		{"file", "/tmp/old", aFile, "/tmp", "old", false},
		{"file", "old", aFile, ".", "old", false},
		{"file", "/link", link, "/real", "file", false},
		{"file", "/tmp/old/", aFile, "", "", true},
		{"d", "/tmp", aDir, "/tmp", "d", false},
		{"d/", "/tmp", aDir, "/tmp", "d", false},
		{"d/.", "/tmp", aDir, "/tmp", "", false},
		{"d", "/new", nil, "/new", "", false},
		{"d", "/file", aFile, "", "", true},
	} {
		isDir := strings.HasPrefix(c.local, "d")
		gotDir, got, err := uploadTarget(isDir, dir+"/"+c.local, c.remote, c.there)
		if gotDir != c.wantDir || got != c.want || (err != nil) != c.fails {
			t.Errorf("up %s to %s: %q, %q, %v", c.local, c.remote, gotDir, got, err)
		}
	}
	for _, c := range []struct {
		remote, local string
		wantDir, want string
		fails         bool
	}{
		{"f", dir, dir, "f", false},
		{"f", dir + "/new/", dir + "/new/", "f", false},
		{"f", dir + "/new", dir, "new", false},
		{"f", dir + "/file", dir, "file", false},
		{"f", dir + "/file/", "", "", true},
		{"D", dir, dir + "/D", "", false},
		{"D/.", dir, dir, "", false},
		{"D", dir + "/new", dir + "/new", "", false},
		{"D", dir + "/file", "", "", true},
	} {
		gotDir, got, err := downloadTarget(strings.HasPrefix(c.remote, "D"), c.remote, c.local, c.remote[:1])
		if gotDir != c.wantDir || got != c.want || (err != nil) != c.fails {
			t.Errorf("down %s to %s: %q, %q, %v", c.remote, c.local, gotDir, got, err)
		}
	}
	for _, base := range []string{"", ".", "..", "a/b"} {
		if _, _, err := downloadTarget(false, "f", dir, base); err == nil {
			t.Errorf("the name %q was taken from the agent", base)
		}
	}
}

// FuzzUnpack: no archive makes the unpacker panic or write outside.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, file("a/b", "x"), entry{tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: ".."}, ""}, file("l/secret", "y")).Bytes())
	f.Add(archive(f, entry{tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0}, ""}, file("d/x", "z")).Bytes())
	f.Add([]byte("nonsense"))
	f.Fuzz(func(t *testing.T, b []byte) {
		outside := t.TempDir()
		inside := filepath.Join(outside, "copy")
		if err := os.Mkdir(inside, 0o755); err != nil {
			t.Fatal(err)
		}
		_, _ = unpackInto(t, inside, "", false, bytes.NewReader(b))
		if all, _ := os.ReadDir(outside); len(all) != 1 {
			t.Errorf("outside there is %v", all)
		}
	})
}
