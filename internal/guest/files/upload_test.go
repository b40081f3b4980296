package files

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/access"
)

type part struct{ field, name, text string }

func form(parts ...part) (contentType string, body []byte) {
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for _, p := range parts {
		h := textproto.MIMEHeader{}
		h.Set("Content-Disposition", fmt.Sprintf("form-data; name=%q; filename=%q", p.field, p.name))
		pw, _ := m.CreatePart(h)
		_, _ = io.WriteString(pw, p.text)
	}
	m.Close()
	return m.FormDataContentType(), b.Bytes()
}

func zipped(b []byte) []byte {
	var z bytes.Buffer
	g := gzip.NewWriter(&z)
	_, _ = g.Write(b)
	g.Close()
	return z.Bytes()
}

func (w *world) form(query map[string]string, parts ...part) reply {
	kind, body := form(parts...)
	v := q()
	for k, s := range query {
		v.Set(k, s)
	}
	return w.do(call{"POST", "/files", v, map[string]string{"Content-Type": kind}, bytes.NewReader(body)})
}

func TestUploadOctets(t *testing.T) {
	w := newWorld(t)
	r := w.do(octets("", "new/dir/f.txt", "text"))
	w.want(r, 200)
	if want := `[{"name":"f.txt","type":"file","path":"` + w.home + `/new/dir/f.txt"}]` + "\n"; r.text != want {
		t.Errorf("answer %s, want %s", r.text, want)
	}
	for _, p := range []string{"new", "new/dir", "new/dir/f.txt"} {
		if uid, _ := w.owner(filepath.Join(w.home, p)); uid != aliceID {
			t.Errorf("%s belongs to %d", p, uid)
		}
	}
	if _, mode := w.owner(w.home + "/new/dir/f.txt"); mode != 0o644 {
		t.Errorf("mode %v", mode)
	}
	for _, size := range []int{0, 1, bufferBytes - 1, bufferBytes, bufferBytes + 1, 5*bufferBytes + 3} {
		text := string(pattern(size))
		w.want(w.do(octets("bob", "f", text)), 200)
		if got := w.get(filepath.Join(w.dir, "bob/f")); got != text {
			t.Errorf("%d bytes became %d", size, len(got))
		}
	}
}

func TestUploadForm(t *testing.T) {
	w := newWorld(t)
	w.want(w.form(map[string]string{"path": "one"}, part{"file", "blob", "1"}), 200)
	r := w.form(nil, part{"file", "d/a", "A"}, part{"other", "b", "B"}, part{"file", w.dir + "/alice/c", strings.Repeat("C", 1<<20)})
	w.want(r, 200)
	var got []written
	w.must(json.Unmarshal([]byte(r.text), &got))
	want := []written{{"a", "file", w.home + "/d/a", nil}, {"c", "file", w.home + "/c", nil}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if w.get(w.home+"/one") != "1" || w.get(w.home+"/d/a") != "A" || len(w.get(w.home+"/c")) != 1<<20 {
		t.Error("contents are wrong")
	}
	w.gone(w.home + "/b")

	for name, r := range map[string]reply{
		"no file":          w.form(nil, part{"other", "x", "x"}),
		"two for one path": w.form(map[string]string{"path": "p"}, part{"file", "a", "1"}, part{"file", "b", "2"}),
		"twice the same":   w.form(nil, part{"file", "dup", "1"}, part{"file", "./dup", "2"}),
		"no name":          w.form(nil, part{"file", "", "1"}),
		"directory":        w.form(nil, part{"file", "d", "1"}),
		"trailing slash":   w.form(nil, part{"file", "d/", "1"}),
		"NUL":              w.do(call{"POST", "/files", q("path", "a\x00"), map[string]string{"Content-Type": "application/octet-stream"}, strings.NewReader("x")}),
		"no boundary":      w.do(call{"POST", "/files", q("path", "a"), map[string]string{"Content-Type": "multipart/form-data"}, strings.NewReader("x")}),
		"no type":          w.do(call{"POST", "/files", q("path", "a"), nil, strings.NewReader("x")}),
		"other type":       w.do(call{"POST", "/files", q("path", "a"), map[string]string{"Content-Type": "text/plain"}, strings.NewReader("x")}),
		"no path":          w.do(octets("", "", "x")),
		"encoding":         w.do(call{"POST", "/files", q("path", "a"), map[string]string{"Content-Type": "application/octet-stream", "Content-Encoding": "br"}, strings.NewReader("x")}),
		"not gzip":         w.do(call{"POST", "/files", q("path", "a"), map[string]string{"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}, strings.NewReader("xxxxxxxxxxxxxxxxxxxxxxx")}),
	} {
		t.Run(name, func(t *testing.T) {
			if r.StatusCode != 400 {
				t.Errorf("status %d: %s", r.StatusCode, r.text)
			}
		})
	}
	w.gone(w.home + "/a")
}

// A form that ends within a file leaves nothing of that file.
func TestUploadCutForm(t *testing.T) {
	w := newWorld(t)
	w.put("alice/old", "old content", 0o644, aliceID)
	for _, name := range []string{"fresh", "old"} {
		kind, body := form(part{"file", name, strings.Repeat("x", 600_000)})
		r := w.do(call{"POST", "/files", nil, map[string]string{"Content-Type": kind}, bytes.NewReader(body[:400_000])})
		w.want(r, 400)
	}
	w.gone(w.home + "/fresh")
	if got := w.get(w.home + "/old"); got != "" {
		t.Errorf("half a file was left: %d bytes", len(got))
	}
}

func TestUploadGzip(t *testing.T) {
	w := newWorld(t)
	text := pattern(700_000)
	z := zipped(text)
	up := func(name string, body []byte) reply {
		return w.do(call{"POST", "/files", q("path", name), map[string]string{
			"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}, bytes.NewReader(body)})
	}
	w.want(up("z", z), 200)
	if got := w.get(w.home + "/z"); got != string(text) {
		t.Errorf("got %d bytes", len(got))
	}
	kind, body := form(part{"file", "m", string(text)})
	w.want(w.do(call{"POST", "/files", nil, map[string]string{"Content-Type": kind, "Content-Encoding": "gzip"}, bytes.NewReader(zipped(body))}), 200)
	if got := w.get(w.home + "/m"); got != string(text) {
		t.Errorf("got %d bytes", len(got))
	}
	w.want(up("cut", z[:len(z)/2]), 400)
	w.gone(w.home + "/cut")
	bad := bytes.Clone(z)
	bad[len(bad)-5] ^= 1
	w.want(up("bad", bad), 400)
	w.gone(w.home + "/bad")
}

func TestUploadErrors(t *testing.T) {
	w := newWorld(t)
	w.put("bob/theirs", "x", 0o644, bobID)
	w.must(unix.Mkfifo(filepath.Join(w.home, "fifo"), 0o666))
	w.put("alice/file", "x", 0o644, aliceID)
	for _, tt := range []struct {
		user, path string
		status     int
	}{
		{"alice", "../bob/theirs", 403},
		{"alice", "../bob/new", 403},
		{"alice", "../bob/new/dir/f", 403},
		{"alice", "fifo", 400},
		{"alice", "/dev/null", 400},
		{"alice", ".", 400},
		{"alice", "file/below", 400},
		{"alice", strings.Repeat("n", 300), 400},
		{"eve", "x", 401},
	} {
		// More than the socket buffers hold: the answer must come all the same.
		w.want(w.do(octets(tt.user, tt.path, string(pattern(8<<20)))), tt.status)
	}
	if got := w.get(filepath.Join(w.dir, "bob/theirs")); got != "x" {
		t.Errorf("another's file holds %d bytes", len(got))
	}
}

// An existing file keeps what it is: only its content changes.
func TestUploadKeepsTheFile(t *testing.T) {
	w := newWorld(t)
	p := w.put("alice/f", "old and longer", 0o4751, aliceID)
	w.must(os.Chmod(p, 0o751|os.ModeSetuid))
	w.must(os.Link(p, w.home+"/hard"))
	w.must(os.Symlink("f", w.home+"/soft"))
	w.must(unix.Setxattr(p, "user.foreign", []byte("kept"), 0))
	w.want(w.do(octets("", "soft", "new")), 200)
	if w.get(p) != "new" || w.get(w.home+"/hard") != "new" {
		t.Error("links do not lead to the new content")
	}
	if fi, _ := os.Lstat(w.home + "/soft"); fi.Mode()&os.ModeSymlink == 0 {
		t.Error("the link was replaced")
	}
	// The kernel takes the set-user-id bit from what a user writes into.
	if _, mode := w.owner(p); mode != 0o751 {
		t.Errorf("mode %v, want -rwxr-x--x", mode)
	}
	b := make([]byte, 16)
	if n, err := unix.Getxattr(p, "user.foreign", b); err != nil || string(b[:n]) != "kept" {
		t.Errorf("attribute %q, %v", b[:max(n, 0)], err)
	}
	group := w.put("alice/shared", "old", 0o666, bobID)
	w.want(w.do(octets("", "shared", "new")), 200)
	if uid, _ := w.owner(group); uid != bobID || w.get(group) != "new" {
		t.Errorf("owner %d, content %q", uid, w.get(group))
	}
	w.must(os.Symlink("notyet", w.home+"/ahead"))
	w.want(w.do(octets("", "ahead", "new")), 200)
	if got := w.get(w.home + "/notyet"); got != "new" {
		t.Errorf("file made through a link holds %q", got)
	}
}

func TestUploadMetadata(t *testing.T) {
	w := newWorld(t)
	up := func(name string, header map[string]string) reply {
		c := octets("", name, "text")
		for k, v := range header {
			c.header[k] = v
		}
		return w.do(c)
	}
	stat := func(name string) map[string]string {
		resp, err := w.client("alice").Stat(t.Context(), connect.NewRequest(&filesystem.StatRequest{Path: name}))
		w.must(err)
		return resp.Msg.GetEntry().GetMetadata()
	}
	r := up("f", map[string]string{"X-Metadata-Author": "mish", "x-metadata-purpose": "Up load", "X-Metadata-": "dropped"})
	w.want(r, 200)
	want := map[string]string{"author": "mish", "purpose": "Up load"}
	var got []written
	w.must(json.Unmarshal([]byte(r.text), &got))
	if diff := cmp.Diff(want, got[0].Metadata); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want, stat("f")); diff != "" {
		t.Error(diff)
	}
	p := w.home + "/f"
	w.must(unix.Setxattr(p, "user.foreign", []byte("x"), 0))
	w.must(unix.Setxattr(p, "user.e2b.odd", []byte("\xff"), 0))
	w.must(unix.Setxattr(p, "user.e2b.empty", nil, 0))
	if diff := cmp.Diff(map[string]string{"author": "mish", "purpose": "Up load", "odd": "\uFFFD", "empty": ""}, stat("f")); diff != "" {
		t.Error(diff)
	}
	w.want(up("f", map[string]string{"X-Metadata-Author": "alice"}), 200)
	if diff := cmp.Diff(map[string]string{"author": "alice"}, stat("f")); diff != "" {
		t.Error(diff)
	}
	if r := up("f", nil); strings.Contains(r.text, "metadata") {
		t.Errorf("answer %s", r.text)
	}
	if got := stat("f"); got != nil {
		t.Errorf("metadata %v after an upload without", got)
	}
	if _, err := unix.Getxattr(p, "user.foreign", nil); err != nil {
		t.Errorf("another's attribute: %v", err)
	}
	w.want(up("long", map[string]string{"X-Metadata-" + strings.Repeat("k", maxMetaKey): "v"}), 200)
	for name, h := range map[string]map[string]string{
		"key":   {"X-Metadata-" + strings.Repeat("k", maxMetaKey+1): "v"},
		"value": {"X-Metadata-K": "caf\xc3\xa9"},
		"tab":   {"X-Metadata-K": "a\tb"},
		"size":  {"X-Metadata-A": strings.Repeat("v", 2048), "X-Metadata-B": strings.Repeat("v", 2047)},
	} {
		w.want(up("bad-"+name, h), 400)
		w.gone(w.home + "/bad-" + name)
	}
}

func TestUploadSigned(t *testing.T) {
	w := newWorld(t)
	w.token = "secret"
	c := octets("alice", "hello.txt", "text")
	w.want(w.do(c), 401)
	w.gone(w.home + "/hello.txt")
	c = octets("alice", "hello.txt", "text")
	c.query.Set("signature", access.Sign("hello.txt", "read", "alice", "secret", ""))
	w.want(w.do(c), 401)
	c = octets("alice", "hello.txt", "text")
	c.query.Set("signature", access.Sign("hello.txt", "write", "alice", "secret", ""))
	w.want(w.do(c), 200)
}

// Whoever has gone in the middle leaves no half of a file.
func TestUploadAborted(t *testing.T) {
	w := newWorld(t)
	w.put("alice/old", "old", 0o644, aliceID)
	for _, name := range []string{"fresh", "old"} {
		addr := strings.TrimPrefix(w.url, "http://")
		conn, err := net.Dial("tcp", addr)
		w.must(err)
		_, err = fmt.Fprintf(conn, "POST /files?path=%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n%s",
			name, strings.Repeat("x", 500_000))
		w.must(err)
		// The server has the first buffer when the file has something in it.
		eventually(t, func() bool {
			fi, err := os.Stat(filepath.Join(w.home, name))
			return err == nil && fi.Size() > 3
		})
		w.must(conn.Close())
		if name == "fresh" {
			eventually(t, func() bool { _, err := os.Stat(w.home + "/fresh"); return os.IsNotExist(err) })
			continue
		}
		eventually(t, func() bool { fi, err := os.Stat(w.home + "/old"); return err == nil && fi.Size() == 0 })
	}
}

// Uploads to one file at the same time leave one of them, whole.
func TestUploadsTakeTurns(t *testing.T) {
	w := newWorld(t)
	const size = 3*bufferBytes + 11
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			text := strings.Repeat(string(rune('a'+i)), size-i*bufferBytes/4)
			resp, err := w.http.Post(w.url+"/files?path=f", "application/octet-stream", strings.NewReader(text))
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("status %d", resp.StatusCode)
			}
		})
	}
	wg.Wait()
	got := w.get(w.home + "/f")
	i := int(got[0] - 'a')
	if got != strings.Repeat(got[:1], size-i*bufferBytes/4) {
		t.Errorf("the file is a mixture: %d bytes starting with %q", len(got), got[:1])
	}
	if len(w.svc.turns.queues) != 0 {
		t.Errorf("%d turns are left", len(w.svc.turns.queues))
	}
}
