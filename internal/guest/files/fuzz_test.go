package files

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/agentiso/agentiso/internal/guest/users"
)

func FuzzResolve(f *testing.F) {
	for _, s := range []string{"", "~", "~/a", "../../..", "/a//b", "a\x00", strings.Repeat("a/", 3000), strings.Repeat("b", 256), "/\xff"} {
		f.Add(s, "/home/user")
	}
	f.Fuzz(func(t *testing.T, p, home string) {
		got, err := resolve(users.User{Home: home}, p)
		if err != nil {
			return
		}
		if !filepath.IsAbs(got) || got != filepath.Clean(got) || len(got) > maxPath || strings.Contains(p, "\x00") {
			t.Errorf("%q became %q", p, got)
		}
		if got != "/" && !under(join(got, "x"), got) {
			t.Errorf("%q is not below itself", got)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	f.Add("X-Metadata-Author", "mish")
	f.Add("x-metadata-", "\x00")
	f.Add("X-METADATA-"+strings.Repeat("k", 300), strings.Repeat("v", 5000))
	f.Fuzz(func(t *testing.T, k, v string) {
		meta, err := metadataOf(http.Header{k: {v}})
		if err != nil {
			return
		}
		for k, v := range meta {
			if k == "" || len(k) > maxMetaKey || len(k)+len(v) > maxMetaSize || !printable(k+v) {
				t.Errorf("admitted %q: %q", k, v)
			}
		}
	})
}

func FuzzAcceptEncoding(f *testing.F) {
	f.Add("gzip;q=0.5, *;q=0")
	f.Fuzz(func(t *testing.T, s string) {
		if zip, err := wantsGzip(http.Header{"Accept-Encoding": {s}}); err == nil && zip && !strings.ContainsAny(s, "gGxX*") {
			t.Errorf("%q asked for gzip", s)
		}
	})
}

func FuzzEntryName(f *testing.F) {
	for _, s := range []string{"a/b", "./", "../x", "/x", "a/../../x", "", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := entryName(s)
		if err == nil && !filepath.IsLocal(name) {
			t.Errorf("%q became %q", s, name)
		}
	})
}

// FuzzUnpack is about what is outside of the directory: nothing may be there.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, entry{tar.Header{Name: "a/b"}, "text"}, entry{tar.Header{Name: "l", Linkname: "..", Typeflag: tar.TypeSymlink}, ""}, entry{tar.Header{Name: "l/x"}, "evil"}))
	f.Add(archive(f, entry{tar.Header{Name: "../x"}, "evil"}))
	f.Add(archive(f, entry{tar.Header{Name: "d/", Typeflag: tar.TypeDir}, ""}, entry{tar.Header{Name: "h", Linkname: "d/../../x", Typeflag: tar.TypeLink}, ""}))
	me := users.User{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 64<<10 {
			return
		}
		parent, err := os.MkdirTemp(base, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(parent)
		x := &unpacker{ctx: context.Background(), user: me}
		if err := x.open(filepath.Join(parent, "dst")); err != nil {
			t.Fatal(err)
		}
		defer x.root.Close()
		err = x.all(tar.NewReader(bytes.NewReader(b)))
		if err != nil && !utf8.ValidString(asProblem(err).msg) {
			t.Errorf("message %q", asProblem(err).msg)
		}
		left, err := os.ReadDir(parent)
		if err != nil || len(left) != 1 || !left[0].IsDir() {
			t.Errorf("outside: %v, %v", left, err)
		}
	})
}

func FuzzForm(f *testing.F) {
	kind, body := form(part{"file", "a/b", "text"}, part{"file", "c", "more"})
	boundary := strings.TrimPrefix(kind, "multipart/form-data; boundary=")
	f.Add(boundary, body)
	f.Add("x", []byte("--x\r\nContent-Disposition: form-data; name=file; filename=\"\xff\"\r\n\r\n"))
	me := users.User{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	s := New(Options{})
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, boundary string, body []byte) {
		home, err := os.MkdirTemp(base, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(home)
		me.Home = home
		// One path for all: names from the fuzzer must not reach the real tree.
		list, err := s.receiveParts(t.Context(), me, multipart.NewReader(bytes.NewReader(body), boundary), "f", -1, nil)
		if err == nil && len(list) != 1 {
			t.Errorf("%d files at one path", len(list))
		}
	})
}

func FuzzInotifyRecords(f *testing.F) {
	rec := binary.NativeEndian.AppendUint32(nil, 1)
	for _, v := range []uint32{0x100, 0, 16} {
		rec = binary.NativeEndian.AppendUint32(rec, v)
	}
	f.Add(append(rec, "name\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"...))
	f.Add(rec)
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		_ = parse(b, func(_ int32, _ uint32, name string) error {
			if n++; n > len(b)/16 || strings.Contains(name, "\x00") {
				t.Errorf("record %d of %d bytes: %q", n, len(b), name)
			}
			return nil
		})
	})
}
