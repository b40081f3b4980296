package initrd

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite golden files")

// contents are an agent and two modules, one of them with a length that needs
// padding.
func contents(t *testing.T) Contents {
	t.Helper()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return Contents{
		Agent: file("agent", strings.Repeat("agent", 1000)),
		Modules: []Module{
			{Name: "virtio", Path: file("a.ko", "module a"), Digest: "sha256:a"},
			{Name: "virtio_blk", Path: file("b.ko", "module b, longer"), Digest: "sha256:b"},
		},
	}
}

func archive(t *testing.T, c Contents) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, c); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// TestListing has cpio itself read the archive: names, modes, owners, device
// numbers, link targets.
func TestListing(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("missing capability: cpio")
	}
	cmd := exec.Command("cpio", "-itv", "--quiet", "--numeric-uid-gid")
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	cmd.Stdin = bytes.NewReader(archive(t, contents(t)))
	var errb bytes.Buffer
	cmd.Stderr = &errb
	out, err := cmd.Output()
	if err != nil || errb.Len() > 0 {
		t.Fatalf("cpio -itv: %v %s", err, &errb)
	}
	golden(t, "listing.txt", out)
}

// TestUnpack has cpio unpack it, devices aside, which need root.
func TestUnpack(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("missing capability: cpio")
	}
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-i", "--quiet", "--nonmatching", "dev/*")
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(archive(t, contents(t)))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio -i: %v %s", err, out)
	}
	for name, want := range map[string]string{
		"init":                  strings.Repeat("agent", 1000),
		"shutdown":              strings.Repeat("agent", 1000),
		"modules/list":          "virtio.ko\nvirtio_blk.ko\n",
		"modules/virtio_blk.ko": "module b, longer",
	} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "init")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("init: %v %v", st, err)
	}
}

func TestEqualContentsAreEqualBytes(t *testing.T) {
	if !bytes.Equal(archive(t, contents(t)), archive(t, contents(t))) {
		t.Error("two archives of the same contents differ")
	}
}

func TestWriterRefuses(t *testing.T) {
	for _, name := range []string{"", ".", "..", "../x", "/etc", "a//b", "a/../b", "a/", "a\x00b", trailerName, strings.Repeat("x", maxName)} {
		w := NewWriter(io.Discard)
		if err := w.Dir(name, 0o755); err == nil {
			t.Errorf("name %q was taken", name)
		}
		if err := w.Dir("ok", 0o755); err == nil {
			t.Errorf("after %q the writer goes on", name)
		}
	}
	w := NewWriter(io.Discard)
	if err := w.File("short", 0o644, 10, strings.NewReader("nine char")); !errors.Is(err, io.EOF) {
		t.Errorf("a short file: %v", err)
	}
	w = NewWriter(io.Discard)
	if err := w.File("large", 0o644, maxFile+1, nil); err == nil {
		t.Error("a file over 4 GiB was taken")
	}
	w = NewWriter(io.Discard)
	if err := errors.Join(w.Close(), w.Close()); err == nil {
		t.Error("closed twice")
	}
}

func TestMissingFileIsNamed(t *testing.T) {
	c := contents(t)
	c.Modules[1].Path = filepath.Join(t.TempDir(), "absent.ko")
	err := Write(io.Discard, c)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "modules/virtio_blk.ko") {
		t.Errorf("got %v", err)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	ents, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	return names
}

func newCache(t *testing.T) *Cache {
	t.Helper()
	c, err := OpenCache(filepath.Join(t.TempDir(), "initrd"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCache(t *testing.T) {
	cache, want := newCache(t), contents(t)
	path, err := cache.Path(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, archive(t, want)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := cache.Path(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(again)
	if err != nil || again != path || !os.SameFile(before, after) {
		t.Errorf("made again: %s, %v", again, err)
	}

	// Each part of the contents makes another archive.
	seen := map[string]bool{path: true}
	change := map[string]func(*Contents){
		"agent": func(c *Contents) {
			if err := os.WriteFile(c.Agent, []byte("new agent"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"module": func(c *Contents) { c.Modules[0].Digest = "sha256:c" },
		"order":  func(c *Contents) { c.Modules[0], c.Modules[1] = c.Modules[1], c.Modules[0] },
		"fewer":  func(c *Contents) { c.Modules = c.Modules[:1] },
	}
	for name, f := range change {
		f(&want)
		p, err := cache.Path(t.Context(), want)
		if err != nil || seen[p] {
			t.Errorf("%s: %s, %v", name, p, err)
		}
		seen[p] = true
	}
}

func TestCacheLeavesNothingOnFailure(t *testing.T) {
	cache, c := newCache(t), contents(t)
	c.Modules[1].Path = "/absent"
	if _, err := cache.Path(t.Context(), c); err == nil {
		t.Error("made an archive without one of its modules")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := cache.Path(ctx, contents(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if got := files(t, cache.dir); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
}

func TestPrune(t *testing.T) {
	cache, c := newCache(t), contents(t)
	now := time.Now()
	cache.now = func() time.Time { return now }
	if err := os.WriteFile(filepath.Join(cache.dir, tmpPrefix+"crash"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cache.dir, "not ours"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var last string
	add := func() {
		t.Helper()
		c.Modules[0].Digest += "x"
		var err error
		if last, err = cache.Path(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	for range 6 {
		add()
		now = now.Add(time.Minute)
	}
	if got := len(files(t, cache.dir)); got != 6+2 {
		t.Errorf("%d files while all are recent", got)
	}
	now = now.Add(2 * pruneAge)
	add()
	got := files(t, cache.dir)
	if len(got) != keepRecent+1 {
		t.Errorf("left: %v", got)
	}
	if _, err := os.Stat(last); err != nil {
		t.Errorf("the newest is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(cache.dir, "not ours")); err != nil {
		t.Errorf("a stranger's file is gone: %v", err)
	}
}
