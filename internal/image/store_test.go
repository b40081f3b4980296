package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	s.pause = time.Millisecond
	t.Cleanup(func() { s.Close() })
	return s
}

// entry is one member of a test's tar.
type tarEntry struct {
	name string
	body string
	kind byte // 0: '0' regular, or '5' directory when the name ends in /
	link string
	mode int64 // 0: 0644, directories 0755
	uid  int
	pax  map[string]string
}

var stamp = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.uid, ModTime: stamp, PAXRecords: e.pax}
		switch {
		case h.Typeflag == 0 && strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		case h.Typeflag == 0:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.body))
		}
		if e.pax != nil {
			h.Format = tar.FormatPAX
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func importTar(t testing.TB, s *Store, name string, entries ...tarEntry) domain.Image {
	t.Helper()
	i, err := s.Import(t.Context(), name, bytes.NewReader(makeTar(t, entries...)), nil)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// debugfs asks about the finished disk with a program that is not ours.
func debugfs(t testing.TB, i domain.Image, command string) string {
	t.Helper()
	if _, err := exec.LookPath("debugfs"); err != nil {
		t.Skip("missing capability: debugfs (package e2fsprogs)")
	}
	cmd := exec.Command("debugfs", "-R", command, i.Disk.Path)
	cmd.Env = append(os.Environ(), "DEBUGFS_PAGER=cat", "TZ=UTC")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", command, err)
	}
	return string(out)
}

func fsck(t testing.TB, i domain.Image) {
	t.Helper()
	if _, err := exec.LookPath("e2fsck"); err != nil {
		t.Skip("missing capability: e2fsck (package e2fsprogs)")
	}
	if out, err := exec.Command("e2fsck", "-fn", i.Disk.Path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// ls lists the names in a directory of the disk.
func ls(t testing.TB, i domain.Image, dir string) string {
	t.Helper()
	var ns []string
	for line := range strings.Lines(debugfs(t, i, "ls -p "+dir)) {
		if c := strings.Split(line, "/"); len(c) > 5 && c[5] != "." && c[5] != ".." {
			ns = append(ns, c[5])
		}
	}
	slices.Sort(ns)
	return strings.Join(ns, " ")
}

// nothingLeft fails the test if the store holds anything but the images named.
func nothingLeft(t testing.TB, s *Store, digests ...string) {
	t.Helper()
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if e.Name() != "lock" && e.Name() != "names" {
			got = append(got, e.Name())
		}
	}
	var want []string
	for _, d := range digests {
		want = append(want, dirName(d))
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the store holds other things (-want +got):\n%s", diff)
	}
}

// wantFault checks the kind, and that the user is told what to do.
func wantFault(t testing.TB, err error, k fault.Kind, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", k)
	}
	f := fault.As(err)
	if f.Kind != k {
		t.Errorf("kind is %s, want %s: %v", f.Kind, k, err)
	}
	if f.Next == "" && k != fault.Canceled {
		t.Errorf("no next step in %v", err)
	}
	for _, p := range parts {
		if !strings.Contains(f.Msg, p) {
			t.Errorf("no %q in %q", p, f.Msg)
		}
	}
}

func TestNamesAndRemoval(t *testing.T) {
	s := open(t, Options{})
	a := importTar(t, s, "team/app:v1", tarEntry{name: "a", body: "a"})
	b := importTar(t, s, "dev", tarEntry{name: "b", body: "b"})
	again := importTar(t, s, "second", tarEntry{name: "a", body: "a"})
	if again.Digest != a.Digest {
		t.Errorf("the same content is %s and %s", a.Digest, again.Digest)
	}
	latest := importTar(t, s, "tool:latest", tarEntry{name: "c", body: "c"})

	hex := strings.TrimPrefix(a.Digest, "sha256:")
	for ref, want := range map[string]string{
		"team/app:v1": a.Digest, "second": a.Digest, a.Digest: a.Digest, hex[:12]: a.Digest, "sha256:" + hex[:8]: a.Digest,
		"": b.Digest, "tool": latest.Digest,
	} {
		i, err := s.Image(t.Context(), ref)
		if err != nil || i.Digest != want {
			t.Errorf("%q is %s (%v), want %s", ref, i.Digest, err, want)
		}
	}
	i, err := s.Image(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"second", "team/app:v1"}, i.Names); diff != "" {
		t.Error(diff)
	}
	for _, ref := range []string{"nothing", "0123456789ab", "../dev", "names", "sha256:", hex[:3]} {
		_, err := s.Image(t.Context(), ref)
		wantFault(t, err, fault.NotFound)
	}
	for _, name := range []string{"", "../x", "/x", "a//b", "sha256:" + hex, "a b", "-x", "x\n", strings.Repeat("n", 256)} {
		_, err := s.Import(t.Context(), name, bytes.NewReader(makeTar(t, tarEntry{name: "x"})), nil)
		wantFault(t, err, fault.Invalid)
	}

	nobody := func(string) []string { return nil }
	digest, removed, err := s.Remove(t.Context(), "second", nobody)
	if digest != a.Digest || removed || err != nil {
		t.Errorf("removing one of two names: %s %t %v", digest, removed, err)
	}
	_, _, err = s.Remove(t.Context(), "team/app:v1", func(d string) []string {
		if d != a.Digest {
			t.Errorf("asked for the users of %s", d)
		}
		return []string{"ws-one", "ws-two"}
	})
	wantFault(t, err, fault.InUse, "ws-one, ws-two")
	digest, removed, err = s.Remove(t.Context(), "team/app:v1", nobody)
	if digest != a.Digest || !removed || err != nil {
		t.Errorf("removing the last name: %s %t %v", digest, removed, err)
	}
	_, removed, err = s.Remove(t.Context(), b.Digest, nobody)
	if !removed || err != nil {
		t.Errorf("removing by digest: %t %v", removed, err)
	}
	_, _, err = s.Remove(t.Context(), "dev", nobody)
	wantFault(t, err, fault.NotFound)
	nothingLeft(t, s, latest.Digest)
	all, err := s.Images(t.Context())
	if err != nil || len(all) != 1 || all[0].Digest != latest.Digest {
		t.Errorf("images are %v (%v)", all, err)
	}
}

func TestAmbiguousPrefix(t *testing.T) {
	s := open(t, Options{})
	for _, c := range []string{"0", "1"} {
		d := "sha256:abcd" + c + strings.Repeat("0", 59)
		if err := os.MkdirAll(s.path(dirName(d)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.Image(t.Context(), "abcd")
	wantFault(t, err, fault.Ambiguous)
}

func TestImagesAreReadOnlyAndReadable(t *testing.T) {
	s := open(t, Options{})
	i := importTar(t, s, "x", tarEntry{name: "a", body: "a"})
	for path, want := range map[string]os.FileMode{
		i.Disk.Path:               0o444,
		filepath.Dir(i.Disk.Path): os.ModeDir | 0o755,
		filepath.Join(filepath.Dir(i.Disk.Path), manifestFile): 0o444,
	} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s is %v, want %v", path, info.Mode(), want)
		}
	}
	if i.SizeBytes != i.Disk.SizeBytes || i.UsedBytes == 0 || i.UsedBytes > 16<<20 {
		t.Errorf("sizes: %+v", i)
	}
}

// TestDigestIgnoresHoles compares a sparse disk with a full copy of it.
func TestDigestIgnoresHoles(t *testing.T) {
	s := open(t, Options{})
	i := importTar(t, s, "x", tarEntry{name: "a", body: strings.Repeat("a", 100_000)})
	full, err := os.Create(filepath.Join(t.TempDir(), "full"))
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	sparse, err := os.Open(i.Disk.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer sparse.Close()
	if _, err := io.Copy(struct{ io.Writer }{full}, struct{ io.Reader }{sparse}); err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{sparse, full} {
		got, err := contentDigest(t.Context(), f, i.SizeBytes, config{})
		if err != nil || got != i.Digest {
			t.Errorf("%s has the digest %s (%v), want %s", f.Name(), got, err, i.Digest)
		}
	}
	if got, _ := contentDigest(t.Context(), full, i.SizeBytes, config{User: "x"}); got == i.Digest {
		t.Error("the configuration does not count")
	}
	if _, err := full.WriteAt([]byte{1}, i.SizeBytes-1); err != nil {
		t.Fatal(err)
	}
	if got, _ := contentDigest(t.Context(), full, i.SizeBytes, config{}); got == i.Digest {
		t.Error("the last block does not count")
	}
}

// TestOpenSweeps has the leavings of a dead process, the work of a live one,
// and a name of nothing.
func TestOpenSweeps(t *testing.T) {
	dir := t.TempDir()
	alive := open(t, Options{Dir: dir})
	st, err := alive.stage()
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "tmp-dead")
	if err := os.MkdirAll(filepath.Join(dead, "root", "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := alive.setName("dangling", "sha256:"+strings.Repeat("0", 64)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "names", ".new-1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	open(t, Options{Dir: dir})
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the dead process's directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(st.dir, diskFile)); err != nil {
		t.Errorf("the live process's disk: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "names")); len(left) != 0 {
		t.Errorf("names left: %v", left)
	}
	if err := st.discard(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, alive)
}

// TestDamagedManifest: one bad image leaves the others usable.
func TestDamagedManifest(t *testing.T) {
	s := open(t, Options{})
	good := importTar(t, s, "good", tarEntry{name: "a", body: "a"})
	bad := importTar(t, s, "bad", tarEntry{name: "b", body: "b"})
	path := filepath.Join(filepath.Dir(bad.Disk.Path), manifestFile)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	all, err := s.Images(t.Context())
	if err != nil || len(all) != 1 || all[0].Digest != good.Digest {
		t.Errorf("images are %v (%v)", all, err)
	}
	if _, err := s.Image(t.Context(), "bad"); err == nil || fault.Is(err, fault.NotFound) {
		t.Errorf("a damaged image is %v", err)
	}
	// Making it again mends it.
	if again := importTar(t, s, "bad", tarEntry{name: "b", body: "b"}); again.Digest != bad.Digest {
		t.Errorf("made again it is %s", again.Digest)
	}
	if _, err := s.Image(t.Context(), "bad"); err != nil {
		t.Error(err)
	}
}

func TestClosed(t *testing.T) {
	s := open(t, Options{})
	s.Close()
	_, err := s.Build(context.Background(), recipeMinimal, "", false, nil)
	wantFault(t, err, fault.Unavailable)
	_, err = s.Import(context.Background(), "x", strings.NewReader(""), nil)
	wantFault(t, err, fault.Unavailable)
}

// TestRemoveRacesWithCreate: a workspace that records itself while its image is
// being removed keeps it.
func TestRemoveRacesWithCreate(t *testing.T) {
	s := open(t, Options{})
	i, err := s.Import(t.Context(), "racer", bytes.NewReader(makeTar(t, sample...)), nil)
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	late := func(string) []string {
		if asked++; asked == 1 {
			return nil
		}
		return []string{"late"}
	}
	if _, removed, err := s.Remove(t.Context(), "racer", late); !fault.Is(err, fault.InUse) || removed {
		t.Errorf("removed %t, %v; want in_use", removed, err)
	}
	if got, err := s.Image(t.Context(), "racer"); err != nil || got.Digest != i.Digest {
		t.Errorf("the image is %+v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.o.Dir, tmpPrefix+"*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
