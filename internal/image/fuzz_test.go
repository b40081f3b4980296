package image

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/agentiso/agentiso/internal/image/ext4"
)

// FuzzUnpack gives the unpacker streams that nobody vouches for. Whatever
// comes, it must end, stay inside its limits and write nothing but the disk.
func FuzzUnpack(f *testing.F) {
	f.Add(makeTar(f, sample...), true)
	f.Add(makeTar(f, tarEntry{name: "d/x"}, tarEntry{name: "d/.wh..wh..opq"}, tarEntry{name: ".wh.d"}, tarEntry{name: "../x"}), true)
	f.Add(makeTar(f, tarEntry{name: "a", kind: tar.TypeSymlink, link: "b"}, tarEntry{name: "b", kind: tar.TypeSymlink, link: "a"}, tarEntry{name: "a/c"}), false)
	f.Add(makeTar(f, tarEntry{name: "d/f", body: "x"}, tarEntry{name: "d", kind: tar.TypeLink, link: "d/f"}), false)
	f.Add(compress(f, "gzip", makeTar(f, sample...)), false)
	f.Add(compress(f, "zstd", makeTar(f, sample...)), false)
	f.Add(compress(f, "xz", makeTar(f, sample...)), false)
	f.Fuzz(func(t *testing.T, data []byte, whiteouts bool) {
		dir := t.TempDir()
		disk, err := os.Create(filepath.Join(dir, diskFile))
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		u := &unpacker{fs: ext4.New(disk, ext4.Options{MaxBytes: 8 << 20, MaxFiles: 1000}), dir: dir, streamBytes: 16 << 20}
		for range 2 {
			r, done, err := unpacked(bytes.NewReader(data), whiteouts)
			if err != nil {
				return
			}
			err = u.apply(context.Background(), r, whiteouts)
			done()
			if err != nil {
				return
			}
			u.fs.NextLayer()
		}
		if _, err := u.fs.Finish(context.Background()); err != nil {
			t.Errorf("a tree that was taken cannot be finished: %v", err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("files beside the disk: %v %v", entries, err)
		}
	})
}

func FuzzXZDictionary(f *testing.F) {
	f.Add(compress(f, "xz", []byte("x"))[12:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 23 {
			return
		}
		if size, ok := xzDictionarySize(b); ok && (size < 4096 || size > 4<<30) {
			t.Errorf("dictionary of %d bytes", size)
		}
	})
}

// TestXZDictionary reads the size that the encoder wrote, and refuses one
// that is for costing memory.
func TestXZDictionary(t *testing.T) {
	packed := compress(t, "xz", makeTar(t, sample...))
	if size, ok := xzDictionarySize(packed[12:]); !ok || size != 8<<20 {
		t.Errorf("dictionary of %d bytes (%t)", size, ok)
	}
	at := bytes.Index(packed, []byte{0x21, 1})
	packed[at+2] = 40 // 4 GiB
	if _, _, err := unpacked(bytes.NewReader(packed), false); err == nil {
		t.Error("a dictionary of 4 GiB is accepted")
	}
}
