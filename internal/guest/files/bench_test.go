package files

import (
	"archive/tar"
	"bytes"
	"io"
	"net/http"
	"os"
	"testing"
)

// The pace of this package itself, without a link: over loopback, as a user.

func benchWorld(b *testing.B) *world {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("missing capability: root")
	}
	return newWorld(b)
}

const benchSize = 64 << 20

func BenchmarkDownload(b *testing.B) {
	w := benchWorld(b)
	w.must(os.WriteFile(w.home+"/f", pattern(benchSize), 0o644))
	b.SetBytes(benchSize)
	buf := make([]byte, 1<<20)
	for b.Loop() {
		resp, err := w.http.Get(w.url + "/files?path=f")
		w.must(err)
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{resp.Body}, buf)
		w.must(err)
		w.must(resp.Body.Close())
	}
}

func benchUpload(b *testing.B, kind string, body []byte, path string) {
	w := benchWorld(b)
	b.SetBytes(benchSize)
	for b.Loop() {
		resp, err := w.http.Post(w.url+path, kind, bytes.NewReader(body))
		w.must(err)
		w.must(resp.Body.Close())
		if resp.StatusCode != http.StatusOK {
			b.Fatal(resp.Status)
		}
	}
}

func BenchmarkUploadOctets(b *testing.B) {
	benchUpload(b, "application/octet-stream", pattern(benchSize), "/files?path=f")
}

func BenchmarkUploadForm(b *testing.B) {
	kind, body := form(part{"file", "f", string(pattern(benchSize))})
	benchUpload(b, kind, body, "/files")
}

func BenchmarkUnpack(b *testing.B) {
	benchUpload(b, "application/x-tar", archive(b, entry{tar.Header{Name: "f"}, string(pattern(benchSize))}), "/files/archive?path=d")
}

func BenchmarkPack(b *testing.B) {
	w := benchWorld(b)
	w.must(os.Mkdir(w.home+"/d", 0o755))
	w.must(os.WriteFile(w.home+"/d/f", pattern(benchSize), 0o644))
	b.SetBytes(benchSize)
	buf := make([]byte, 1<<20)
	for b.Loop() {
		resp, err := w.http.Get(w.url + "/files/archive?path=d")
		w.must(err)
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{resp.Body}, buf)
		w.must(err)
		w.must(resp.Body.Close())
	}
}
