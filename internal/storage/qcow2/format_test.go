package qcow2

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
)

var update = flag.Bool("update", false, "rewrite golden files")

// TestLayout holds every byte that is not zero.
func TestLayout(t *testing.T) {
	h, table, block, length := Overlay{10 << 30, "/var/lib/agentiso/images/ab/disk.raw", domain.Raw}.layout()
	var b strings.Builder
	for _, p := range []struct {
		name string
		b    []byte
	}{{"header", h}, {"refcount table", table}, {"refcount block", block}} {
		fmt.Fprintf(&b, "%s\n%s", p.name, hex.Dump(p.b))
	}
	fmt.Fprintf(&b, "length %d\n", length)
	golden := filepath.Join("testdata", "overlay.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("layout (-want +got):\n%s", diff)
	}
}

// TestQEMUAgrees has QEMU read overlays of all magnitudes.
func TestQEMUAgrees(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("missing capability: qemu-img")
	}
	dir := t.TempDir()
	b := base(t, dir)
	for _, size := range []int64{512, 1 << 20, 1<<30 - 512, 1 << 30, 1<<30 + 512, 10 << 30, 100 << 40, maxSizeBytes} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(dir, fmt.Sprint(size))
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := (Overlay{size, b.Path, domain.Raw}).WriteTo(f); err != nil {
				t.Fatal(err)
			}
			gotSize, backing, err := readOverlay(f)
			if err != nil || gotSize != size || backing != b.Path {
				t.Errorf("read back: %d, %q, %v", gotSize, backing, err)
			}
			check(t, path)
			out, err := exec.CommandContext(t.Context(), "qemu-img", "info", "--output=json", path).Output()
			if err != nil {
				t.Fatal(err)
			}
			var info struct {
				Size    int64  `json:"virtual-size"`
				Cluster int    `json:"cluster-size"`
				Backing string `json:"full-backing-filename"`
				Format  string `json:"backing-filename-format"`
				Special struct {
					Data struct {
						ExtendedL2 bool `json:"extended-l2"`
						Lazy       bool `json:"lazy-refcounts"`
						Corrupt    bool
					}
				} `json:"format-specific"`
			}
			if err := json.Unmarshal(out, &info); err != nil {
				t.Fatal(err)
			}
			if info.Size != size || info.Cluster != clusterBytes || info.Backing != b.Path || info.Format != "raw" ||
				!info.Special.Data.ExtendedL2 || info.Special.Data.Lazy || info.Special.Data.Corrupt {
				t.Errorf("QEMU reads it as %+v", info)
			}
			// Written to at both ends and in the middle, it is still sound.
			argv := []string{"-f", "qcow2"}
			for _, at := range []int64{0, size / 2 &^ 511, size - 512} {
				argv = append(argv, "-c", fmt.Sprintf("write -P 7 %d 512", at), "-c", fmt.Sprintf("read -P 7 %d 512", at))
			}
			if out, err := exec.CommandContext(t.Context(), "qemu-io", append(argv, path)...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
				t.Errorf("qemu-io: %v: %s", err, out)
			}
			check(t, path)
		})
	}
}

func TestOverlayRefuses(t *testing.T) {
	for name, o := range map[string]Overlay{
		"size zero":       {0, "/b", domain.Raw},
		"size odd":        {513, "/b", domain.Raw},
		"size huge":       {maxSizeBytes + 512, "/b", domain.Raw},
		"no backing":      {512, "", domain.Raw},
		"protocol":        {512, "nbd:host", domain.Raw},
		"relative path":   {512, "a/b", domain.Raw},
		"zero byte":       {512, "/a\x00b", domain.Raw},
		"too long":        {512, "/" + strings.Repeat("x", maxBackingName), domain.Raw},
		"unknown format":  {512, "/b", "vmdk"},
		"no format":       {512, "/b", ""},
		"negative":        {-512, "/b", domain.Raw},
		"json pseudofile": {512, "json:{}", domain.Raw},
	} {
		if err := o.WriteTo(nil); err == nil {
			t.Errorf("%s was written", name)
		}
	}
}

func FuzzReadOverlay(f *testing.F) {
	h, _, _, _ := Overlay{10 << 30, "/b", domain.Raw}.layout()
	f.Add(h)
	f.Add(h[:80])
	f.Add([]byte{})
	for _, at := range []int{8, 12, 16, 24, 28} { // backing offset and length, size
		c := bytes.Clone(h)
		for i := range 4 {
			c[at+i] = 0xff
		}
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		size, backing, err := readOverlay(bytes.NewReader(b))
		if err == nil && (size <= 0 || size > maxSizeBytes || len(backing) > maxBackingName) {
			t.Errorf("accepted size %d, backing of %d bytes", size, len(backing))
		}
	})
}
