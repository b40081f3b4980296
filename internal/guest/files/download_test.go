package files

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/access"
)

func TestDownload(t *testing.T) {
	w := newWorld(t)
	w.put("alice/a.txt", "Hello, world!", 0o644, aliceID)
	w.put("alice/empty", "", 0o644, aliceID)
	big := string(pattern(3*bufferBytes + 17))
	w.put("alice/big", big, 0o644, aliceID)
	w.put("alice/exact", big[:bufferBytes], 0o644, aliceID)
	w.put("bob/secret", "x", 0o600, bobID)
	w.must(unix.Mkfifo(filepath.Join(w.home, "fifo"), 0o666))
	w.must(os.Symlink("a.txt", filepath.Join(w.home, "link")))
	w.must(os.Symlink("fifo", filepath.Join(w.home, "fifolink")))
	tests := []struct {
		name   string
		query  url.Values
		header map[string]string
		status int
		text   string
	}{
		{"default user", q("path", "a.txt"), nil, 200, "Hello, world!"},
		{"absolute", q("path", w.home+"/a.txt"), nil, 200, "Hello, world!"},
		{"tilde", q("path", "~/a.txt"), nil, 200, "Hello, world!"},
		{"link", q("path", "link"), nil, 200, "Hello, world!"},
		{"empty", q("path", "empty"), nil, 200, ""},
		{"big", q("path", "big"), nil, 200, big},
		{"one buffer", q("path", "exact"), nil, 200, big[:bufferBytes]},
		{"username", q("path", "secret", "username", "bob"), nil, 200, "x"},
		{"basic user", q("path", "secret"), map[string]string{"Authorization": asUser("bob").header()}, 200, "x"},
		{"username before basic user", q("path", "secret", "username", "bob"), map[string]string{"Authorization": asUser("alice").header()}, 200, "x"},
		{"first bytes", q("path", "a.txt"), map[string]string{"Range": "bytes=0-4"}, 206, "Hello"},
		{"last bytes", q("path", "a.txt"), map[string]string{"Range": "bytes=7-"}, 206, "world!"},
		{"range of big", q("path", "big"), map[string]string{"Range": "bytes=700000-700009"}, 206, big[700000:700010]},
		{"range and gzip", q("path", "a.txt"), map[string]string{"Range": "bytes=0-4", "Accept-Encoding": "gzip"}, 206, "Hello"},
		{"range outside", q("path", "a.txt"), map[string]string{"Range": "bytes=99-"}, 416, "*"},
		{"not modified", q("path", "a.txt"), map[string]string{"If-Modified-Since": time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)}, 304, ""},
		{"none", q("path", "none"), nil, 404, "*"},
		{"below a file", q("path", "a.txt/x"), nil, 404, "*"},
		{"directory", q("path", "."), nil, 400, "*"},
		{"no path", nil, nil, 400, "*"},
		{"fifo", q("path", "fifo"), nil, 400, "*"},
		{"link to fifo", q("path", "fifolink"), nil, 400, "*"},
		{"device", q("path", "/dev/zero"), nil, 400, "*"},
		{"NUL", q("path", "a\x00b"), nil, 400, "*"},
		{"long", q("path", strings.Repeat("x/", 3000)), nil, 400, "*"},
		{"forbidden", q("path", "../bob/secret"), nil, 403, "*"},
		{"unknown user", q("path", "a.txt", "username", "eve"), nil, 401, "*"},
		{"bad basic", q("path", "a.txt"), map[string]string{"Authorization": "Basic ?"}, 401, "*"},
		{"no encoding left", q("path", "a.txt"), map[string]string{"Accept-Encoding": "br, identity;q=0"}, 406, "*"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := w.at(t)
			r := w.do(call{"GET", "/files", tt.query, tt.header, nil})
			if r.StatusCode != tt.status {
				t.Fatalf("status %d, want %d: %.200s", r.StatusCode, tt.status, r.text)
			}
			if tt.text == "*" {
				if tt.status != 416 {
					w.want(r, tt.status)
				}
				return
			}
			if r.text != tt.text {
				t.Errorf("got %d bytes, want %d", len(r.text), len(tt.text))
			}
			if tt.status == 200 && r.ContentLength != int64(len(tt.text)) {
				t.Errorf("Content-Length %d, want %d", r.ContentLength, len(tt.text))
			}
		})
	}
	if r := w.do(call{"GET", "/files", q("path", "none"), nil, nil}); !strings.Contains(r.text, "path '"+w.home+"/none' does not exist") {
		t.Errorf("message %q", r.text)
	}
	if r := w.do(call{"HEAD", "/files", q("path", "a.txt"), nil, nil}); r.StatusCode != 200 || r.ContentLength != 13 {
		t.Errorf("HEAD: %d, length %d", r.StatusCode, r.ContentLength)
	}
}

func TestDownloadDisposition(t *testing.T) {
	w := newWorld(t)
	for name, want := range map[string]string{
		"test.txt":        `inline; filename=test.txt`,
		"my document.pdf": `inline; filename="my document.pdf"`,
		`file"name.txt`:   `inline; filename="file\"name.txt"`,
		"文档.pdf":          "inline; filename*=utf-8''%E6%96%87%E6%A1%A3.pdf",
		".env":            `inline; filename=.env`,
	} {
		w.put("alice/"+name, "x", 0o644, aliceID)
		r := w.do(call{"GET", "/files", q("path", name), nil, nil})
		if got := r.Header.Get("Content-Disposition"); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		if got := r.Header.Get("Content-Type"); got != "application/octet-stream" {
			t.Errorf("%s: Content-Type %q", name, got)
		}
	}
}

func TestDownloadGzip(t *testing.T) {
	w := newWorld(t)
	for _, size := range []int{0, 10, 2*bufferBytes + 5} {
		text := pattern(size)
		w.put("alice/f", string(text), 0o644, aliceID)
		r := w.do(call{"GET", "/files", q("path", "f"), map[string]string{"Accept-Encoding": "deflate, gzip, br"}, nil})
		if r.Header.Get("Content-Encoding") != "gzip" {
			t.Fatalf("headers %v", r.Header)
		}
		z, err := gzip.NewReader(strings.NewReader(r.text))
		w.must(err)
		got, err := io.ReadAll(z)
		w.must(err)
		if !bytes.Equal(got, text) {
			t.Errorf("got %d bytes, want %d", len(got), len(text))
		}
	}
}

// Files of the kernel have other sizes than they say.
func TestDownloadKernelFiles(t *testing.T) {
	w := newWorld(t)
	for _, p := range []string{"/proc/version", "/proc/self/status", "/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/kallsyms"} {
		want, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		r := w.do(call{"GET", "/files", q("path", p, "username", "root"), nil, nil})
		w.want(r, 200)
		if p != "/proc/self/status" && p != "/proc/cpuinfo" && r.text != string(want) {
			t.Errorf("%s: got %d bytes, want %d", p, len(r.text), len(want))
		}
		if len(r.text) == 0 {
			t.Errorf("%s is empty", p)
		}
	}
}

func TestDownloadSigned(t *testing.T) {
	w := newWorld(t)
	w.put("alice/hello.txt", "hello world", 0o644, aliceID)
	w.token = "secret"
	soon := strconv.FormatInt(time.Now().Unix()+10_000, 10)
	past := strconv.FormatInt(time.Now().Unix()-10_000, 10)
	for _, tt := range []struct {
		name   string
		query  url.Values
		header map[string]string
		status int
		text   string
	}{
		{"signed", q("path", "hello.txt", "username", "alice", "signature_expiration", soon,
			"signature", access.Sign("hello.txt", "read", "alice", "secret", soon)), nil, 200, "hello world"},
		{"for ever", q("path", "hello.txt", "signature", access.Sign("hello.txt", "read", "", "secret", "")), nil, 200, "hello world"},
		{"expired", q("path", "hello.txt", "signature_expiration", past,
			"signature", access.Sign("hello.txt", "read", "", "secret", past)), nil, 401, `{"code":401,"message":"signature is already expired"}` + "\n"},
		{"wrong", q("path", "hello.txt", "signature", access.Sign("hello.txt", "write", "", "secret", "")), nil, 401, `{"code":401,"message":"invalid signature"}` + "\n"},
		{"missing", q("path", "hello.txt"), nil, 401, `{"code":401,"message":"missing signature query parameter"}` + "\n"},
		{"token", q("path", "hello.txt"), map[string]string{"X-Access-Token": "secret"}, 200, "hello world"},
		{"wrong token", q("path", "hello.txt"), map[string]string{"X-Access-Token": "wrong"}, 401, `{"code":401,"message":"access token present in header but does not match"}` + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := w.at(t)
			r := w.do(call{"GET", "/files", tt.query, tt.header, nil})
			if r.StatusCode != tt.status || r.text != tt.text {
				t.Errorf("got %d %q, want %d %q", r.StatusCode, r.text, tt.status, tt.text)
			}
		})
	}
}

func TestWantsGzip(t *testing.T) {
	for header, want := range map[string]string{
		"":                                   "plain",
		"gzip":                               "gzip",
		"GZIP":                               "gzip",
		"deflate, gzip, br":                  "gzip",
		"gzip;q=1.0":                         "gzip",
		"gzip ; q=0.5":                       "gzip",
		"gzip;q=nonsense":                    "gzip",
		"identity":                           "plain",
		"*":                                  "plain",
		"br":                                 "plain",
		"br;q=0.5, gzip;q=1.0, deflate;q=.8": "gzip",
		"br;q=1.0, gzip;q=0.5":               "gzip",
		"gzip;q=0.5, identity;q=1.0":         "plain",
		"gzip, identity":                     "plain",
		"gzip;q=0, identity":                 "plain",
		"gzip;q=0, br":                       "plain",
		"br, identity;q=0":                   "none",
		"*, identity;q=0":                    "gzip",
		"*;q=0":                              "none",
		"gzip, *;q=0":                        "gzip",
	} {
		got := "plain"
		zip, err := wantsGzip(http.Header{"Accept-Encoding": {header}})
		if err != nil {
			got = "none"
		} else if zip {
			got = "gzip"
		}
		if got != want {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
}

// A file is handed over without being held: the heap must not follow its size.
func TestTransfersDoNotGrow(t *testing.T) {
	w := newWorld(t)
	const size = 64 << 20
	p := w.put("alice/big", "", 0o644, aliceID)
	w.must(os.Truncate(p, size))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	resp, err := w.http.Get(w.url + "/files?path=big")
	w.must(err)
	up, err := http.NewRequestWithContext(t.Context(), "POST", w.url+"/files?path=copy", resp.Body)
	w.must(err)
	up.Header.Set("Content-Type", "application/octet-stream")
	got, err := w.http.Do(up)
	w.must(err)
	w.must(resp.Body.Close())
	w.must(got.Body.Close())
	if got.StatusCode != 200 {
		t.Fatalf("status %d", got.StatusCode)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > size/4 {
		t.Errorf("%d bytes were allocated to move %d", n, size)
	}
	if fi, err := os.Stat(filepath.Join(w.home, "copy")); err != nil || fi.Size() != size {
		t.Errorf("copy: %v, %v", fi, err)
	}
}
