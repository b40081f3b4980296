package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

var sample = []tarEntry{
	{name: "./", mode: 0o755},
	{name: "./bin/", mode: 0o755},
	{name: "./bin/su", body: "#!", mode: 0o4755},
	{name: "./bin/ping", body: "x", mode: 0o755, pax: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"SCHILY.xattr.user.note":           "hello",
	}},
	{name: "./bin/su2", kind: tar.TypeLink, link: "./bin/su"},
	{name: "./lib", kind: tar.TypeSymlink, link: "usr/lib"},
	{name: "./tmp/", mode: 0o1777},
	{name: "./etc/owned", body: "mine", uid: 1000},
}

func checkSample(t *testing.T, i domain.Image) {
	t.Helper()
	fsck(t, i)
	for file, want := range map[string]string{
		"/bin/su": "Mode:  04755", "/bin/su2": "Links: 2", "/tmp": "Mode:  01777", "/etc/owned": "User:  1000", "/lib": `dest: "usr/lib"`,
	} {
		if out := debugfs(t, i, "stat "+file); !strings.Contains(out, want) {
			t.Errorf("%s: no %q in\n%s", file, want, out)
		}
	}
	attrs := debugfs(t, i, "ea_list /bin/ping")
	for _, want := range []string{"security.capability (20)", `user.note (5) = "hello"`} {
		if !strings.Contains(attrs, want) {
			t.Errorf("no %q in %s", want, attrs)
		}
	}
}

func compress(t testing.TB, format string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch format {
	case "plain":
		return b
	case "gzip":
		w = gzip.NewWriter(&out)
	case "xz":
		w, err = xz.NewWriter(&out)
	case "zstd":
		w, err = zstd.NewWriter(&out)
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestImportFormats(t *testing.T) {
	s := open(t, Options{})
	digests := map[string]bool{}
	for _, format := range []string{"plain", "gzip", "xz", "zstd"} {
		i, err := s.Import(t.Context(), "x-"+format, bytes.NewReader(compress(t, format, makeTar(t, sample...))), nil)
		if err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		digests[i.Digest] = true
		checkSample(t, i)
	}
	if len(digests) != 1 {
		t.Errorf("one content has %d digests", len(digests))
	}
	// bzip2 of a tar with the file "b" that holds "bzip2\n"; there is no writer.
	packed, err := base64.StdEncoding.DecodeString(bzip2Tar)
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.Import(t.Context(), "x-bzip2", bytes.NewReader(packed), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := debugfs(t, i, "cat /b"); got != "bzip2\n" {
		t.Errorf("reads %q", got)
	}
}

func TestImportRefuses(t *testing.T) {
	whole := makeTar(t, tarEntry{name: "a/file", body: strings.Repeat("0123456789", 5000)})
	for _, tc := range []struct {
		name string
		data []byte
		kind fault.Kind
		says string
	}{
		{"empty", nil, fault.Invalid, "empty"},
		{"text", []byte(strings.Repeat("hello world\n", 100)), fault.Invalid, "damaged"},
		{"zip", []byte("PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaa"), fault.Invalid, "a zip archive"},
		{"program", []byte("\x7fELFaaaaaaaaaaaaaaaaaaaaaaa"), fault.Invalid, "a program"},
		{"cut short", whole[:20000], fault.Invalid, "cut short"},
		{"cut between entries", whole[:512+50176], fault.Invalid, "cut short"},
		{"cut short gzip", compress(t, "gzip", whole)[:120], fault.Invalid, "gzip data is damaged or cut short"},
		{"cut short zstd", compress(t, "zstd", whole)[:40], fault.Invalid, "zstd"},
		{"cut short xz", compress(t, "xz", whole)[:100], fault.Invalid, "xz"},
		{"damaged gzip", append(compress(t, "gzip", whole)[:60], 1, 2, 3, 4, 5, 6, 7, 8), fault.Invalid, "gzip"},
		{"escape", makeTar(t, tarEntry{name: "../../etc/passwd", body: "x"}), fault.Invalid, "leads out"},
		{"escape by link", makeTar(t, tarEntry{name: "l", kind: tar.TypeLink, link: "../../etc/shadow"}), fault.Invalid, "leads out"},
		{"link to nothing", makeTar(t, tarEntry{name: "l", kind: tar.TypeLink, link: "etc/shadow"}), fault.Invalid, "no such file"},
		{"huge xattr", makeTar(t, tarEntry{name: "f", pax: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 9000)}}), fault.Invalid, "attributes"},
		{"unknown type", makeTar(t, tarEntry{name: "f", kind: 'Z'}), fault.Invalid, "unknown type"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{})
			_, err := s.Import(t.Context(), "x", bytes.NewReader(tc.data), nil)
			wantFault(t, err, tc.kind, tc.says)
			nothingLeft(t, s)
		})
	}
}

func TestImportLimits(t *testing.T) {
	var many []tarEntry
	for i := range 50 {
		many = append(many, tarEntry{name: strings.Repeat("d/", i) + "f"})
	}
	bomb := compress(t, "gzip", makeTar(t, tarEntry{name: "zeros", body: string(make([]byte, 8<<20))}))
	s := open(t, Options{MaxBytes: 4 << 20, MaxFiles: 40})
	for name, data := range map[string][]byte{"files": makeTar(t, many...), "bytes": bomb} {
		_, err := s.Import(t.Context(), "x", bytes.NewReader(data), nil)
		wantFault(t, err, fault.Limit)
		if t.Failed() {
			t.Log(name)
		}
	}
	nothingLeft(t, s)
}

// failing reads some bytes and then fails.
type failing struct {
	r   io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if errors.Is(err, io.EOF) {
		err = f.err
	}
	return n, err
}

func TestImportSourceFails(t *testing.T) {
	s := open(t, Options{})
	part := makeTar(t, sample...)[:3000]
	broken := errors.New("connection reset")
	_, err := s.Import(t.Context(), "x", &failing{bytes.NewReader(part), broken}, nil)
	if !errors.Is(err, broken) || fault.Is(err, fault.Invalid) {
		t.Errorf("error is %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err = s.Import(ctx, "x", io.TeeReader(bytes.NewReader(makeTar(t, sample...)), cancelWriter{cancel}), nil)
	wantFault(t, err, fault.Canceled)
	nothingLeft(t, s)
}

type cancelWriter struct{ cancel func() }

func (c cancelWriter) Write(p []byte) (int, error) { c.cancel(); return len(p), nil }

// ociSample is an image of two layers with a configuration.
func ociSample(t testing.TB) v1.Image {
	t.Helper()
	img := withLayers(t, empty.Image,
		makeTar(t, append(sample, tarEntry{name: "gone", body: "x"})...),
		makeTar(t, tarEntry{name: ".wh.gone"}, tarEntry{name: "upper", body: "upper"}))
	img, err := mutate.ConfigFile(img, mustConfig(t, img, func(c *v1.ConfigFile) {
		c.OS, c.Architecture = platform.OS, platform.Architecture
		c.Config.User, c.Config.WorkingDir = "app", "/srv"
		c.Config.Env = []string{"A=1", "EMPTY=", "=odd"}
		c.Config.Entrypoint, c.Config.Cmd = []string{"/entry"}, []string{"serve", "-v"}
	}))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func mustConfig(t testing.TB, img v1.Image, edit func(*v1.ConfigFile)) *v1.ConfigFile {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	edit(c)
	return c
}

func withLayers(t testing.TB, img v1.Image, tars ...[]byte) v1.Image {
	t.Helper()
	for _, b := range tars {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

func checkOCISample(t *testing.T, i domain.Image) {
	t.Helper()
	checkSample(t, i)
	if got := ls(t, i, "/"); got != "bin etc lib lost+found tmp upper" {
		t.Errorf("the root holds %s", got)
	}
	want := domain.Image{User: "app", Workdir: "/srv", Env: map[string]string{"A": "1", "EMPTY": ""}, Entrypoint: []string{"/entry"}, Cmd: []string{"serve", "-v"}}
	got := domain.Image{User: i.User, Workdir: i.Workdir, Env: i.Env, Entrypoint: i.Entrypoint, Cmd: i.Cmd}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func dirTar(t *testing.T, dir string) []byte {
	t.Helper()
	var entries []tarEntry
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		entries = append(entries, tarEntry{name: rel, body: string(b)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return makeTar(t, entries...)
}

func TestImportImageArchives(t *testing.T) {
	img := ociSample(t)
	tag := name.MustParseReference("example/app:v1")
	var saved bytes.Buffer
	if err := tarball.Write(tag, img, &saved); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: empty.Image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "riscv64"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &platform}})
	if _, err := layout.Write(dir, index); err != nil {
		t.Fatal(err)
	}
	for kind, data := range map[string][]byte{
		"docker save": saved.Bytes(), "docker save, zipped": compress(t, "gzip", saved.Bytes()), "OCI layout": dirTar(t, dir),
	} {
		t.Run(kind, func(t *testing.T) {
			s := open(t, Options{})
			i, err := s.Import(t.Context(), "x", bytes.NewReader(data), nil)
			if err != nil {
				t.Fatal(err)
			}
			checkOCISample(t, i)
			nothingLeft(t, s, i.Digest)
		})
	}
}

func TestImportArchiveRefuses(t *testing.T) {
	one, two := name.MustParseReference("a:1"), name.MustParseReference("b:1")
	var both bytes.Buffer
	if err := tarball.MultiRefWrite(map[name.Reference]v1.Image{one: ociSample(t), two: withLayers(t, empty.Image, makeTar(t))}, &both); err != nil {
		t.Fatal(err)
	}
	other, err := mutate.ConfigFile(ociSample(t), mustConfig(t, ociSample(t), func(c *v1.ConfigFile) { c.Architecture = "s390x" }))
	if err != nil {
		t.Fatal(err)
	}
	var foreign bytes.Buffer
	if err := tarball.Write(one, other, &foreign); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*v1.Config)) []byte {
		img, err := mutate.ConfigFile(ociSample(t), mustConfig(t, ociSample(t), func(c *v1.ConfigFile) { change(&c.Config) }))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := tarball.Write(one, img, &b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	for _, tc := range []struct {
		name string
		data []byte
		kind fault.Kind
		says string
	}{
		{"huge environment", with(func(c *v1.Config) { c.Env = []string{"A=" + strings.Repeat("x", maxProcessBytes)} }), fault.Limit, "environment"},
		{"huge user", with(func(c *v1.Config) { c.User = strings.Repeat("x", maxProcessBytes) }), fault.Limit, "user"},
		{"zero byte in the environment", with(func(c *v1.Config) { c.Env = []string{"A=x\x00y"} }), fault.Invalid, "zero byte"},
		{"zero byte in the directory", with(func(c *v1.Config) { c.WorkingDir = "/x\x00" }), fault.Invalid, "zero byte"},
		{"two images", both.Bytes(), fault.Invalid, "holds 2 images"},
		{"other platform", foreign.Bytes(), fault.NotFound, "s390x"},
		{"no config", makeTar(t, tarEntry{name: "manifest.json", body: `[{"Config":"c.json","Layers":[]}]`}), fault.Invalid, "c.json"},
		{"no json", makeTar(t, tarEntry{name: "manifest.json", body: `[`}), fault.Invalid, ""},
		{"bad index", makeTar(t, tarEntry{name: "index.json", body: `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("0", 64) + `","size":3}]}`}), fault.Invalid, "missing"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{})
			_, err := s.Import(t.Context(), "x", bytes.NewReader(tc.data), nil)
			wantFault(t, err, tc.kind, tc.says)
			nothingLeft(t, s)
		})
	}
}

// TestImportLooksLikeAnArchive is a root file system whose first name an image
// archive could have.
func TestImportLooksLikeAnArchive(t *testing.T) {
	s := open(t, Options{})
	i := importTar(t, s, "x", tarEntry{name: "blobs/"}, tarEntry{name: "etc/passwd", body: "x"})
	if got := ls(t, i, "/"); got != "blobs etc lost+found" {
		t.Errorf("the root holds %s", got)
	}
	nothingLeft(t, s, i.Digest)
}

const bzip2Tar = "QlpoOTFBWSZTWR3vBA0AAG57gMmQAARAAHcAAADwIF4QCAggAFRCjJhpMmA09UElNRppiMgNGX5iMhBDNCEb+U1KzjBAhwVYpkJnCOGRVY/Kdsr0493AVQAEMzIvxdyRThQkB3vBA0A="
