package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestExtractVmlinux(t *testing.T) {
	want := pvhVmlinux(strings.Repeat(banner, 5000))
	for _, how := range []string{"gzip", "xz", "zstd", "lz4", "none"} {
		got, err := extractVmlinux(bzImage(t, how, want))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", how, len(got), err)
		}
	}
}

func TestExtractVmlinuxRefuses(t *testing.T) {
	good := bzImage(t, "lz4", pvhVmlinux(banner))
	edit := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	for _, tt := range []struct {
		name  string
		image []byte
		want  string
	}{
		{"old protocol", edit(func(b []byte) { binary.LittleEndian.PutUint16(b[offVersion:], 0x0207) }), "too old"},
		{"outside", edit(func(b []byte) { binary.LittleEndian.PutUint32(b[offPayloadLength:], 1<<31) }), "outside the file"},
		{"empty", edit(func(b []byte) { binary.LittleEndian.PutUint32(b[offPayloadLength:], 0) }), "payload of 0 bytes"},
		{"unknown", edit(func(b []byte) { copy(b[4*sector+100:], "BZh91AY") }), "compression is not known"},
		{"wrong size", edit(func(b []byte) { b[len(b)-len("trailing code")-4]++ }), "should be"},
	} {
		if _, err := extractVmlinux(tt.image); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
	for _, b := range [][]byte{nil, make([]byte, 1024), pvhVmlinux(banner)} {
		if _, err := extractVmlinux(b); !errors.Is(err, errNotBzImage) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
}

func FuzzExtractVmlinux(f *testing.F) {
	for _, how := range []string{"gzip", "xz", "zstd", "lz4", "none"} {
		f.Add(bzImage(f, how, pvhVmlinux(banner)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := extractVmlinux(b)
		if err == nil {
			_, _ = inspectVmlinux(out) // must not panic either
		}
	})
}

func TestInspectVmlinux(t *testing.T) {
	for _, tt := range []struct {
		name  string
		image []byte
		want  vmlinuxFacts
	}{
		{"distribution", pvhVmlinux(banner), vmlinuxFacts{Release: "6.1.0-56-cloud-amd64", PVH: true}},
		{"lean", pvhVmlinux(banner + mmioMarker), vmlinuxFacts{Release: "6.1.0-56-cloud-amd64", PVH: true, MMIOCmdline: true}},
		{"no PVH", fakeVmlinux(note("Xen", phys32Entry+1, []byte{1}), banner), vmlinuxFacts{Release: "6.1.0-56-cloud-amd64"}},
		{"another's note", fakeVmlinux(note("GNU", phys32Entry, []byte{1}), ""), vmlinuxFacts{}},
		{"broken note", fakeVmlinux([]byte{255, 255, 255, 255, 255, 255, 255, 255, 18, 0, 0, 0, 'X'}, ""), vmlinuxFacts{}},
	} {
		got, err := inspectVmlinux(tt.image)
		if err != nil || got != tt.want {
			t.Errorf("%s: got %+v, %v", tt.name, got, err)
		}
	}
	arm := pvhVmlinux("")
	binary.LittleEndian.PutUint16(arm[18:], 183)
	for _, b := range [][]byte{nil, []byte("text"), arm} {
		if _, err := inspectVmlinux(b); !errors.Is(err, errNotELF) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
}

// modulesDir makes a modules directory in every compression there is.
func modulesDir(t *testing.T, drop ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, m := range []struct{ file, how, depends string }{
		{"kernel/drivers/virtio/virtio.ko", "none", "virtio_ring"},
		{"kernel/drivers/virtio/virtio_ring.ko", "none", ""},
		{"kernel/drivers/virtio/virtio_mmio.ko.xz", "xz", "virtio,virtio_ring"},
		{"kernel/drivers/block/virtio_blk.ko.zst", "zstd", "virtio_ring,virtio"},
		{"kernel/drivers/char/virtio_console.ko.gz", "gzip", "virtio_ring,virtio"},
		{"kernel/net/core/failover.ko", "none", ""},
		{"kernel/drivers/net/net_failover.ko", "none", "failover"},
		{"kernel/drivers/net/virtio_net.ko", "none", "net-failover,virtio,virtio_ring"},
		{"kernel/fs/other.ko", "none", "never_looked_at"},
	} {
		put(t, filepath.Join(dir, m.file), string(pack(t, m.how, fakeModule(modinfo(m.depends)))))
	}
	put(t, filepath.Join(dir, "modules.builtin"), "kernel/fs/ext4/ext4.ko\nkernel/fs/jbd2/jbd2.ko\n")
	put(t, filepath.Join(dir, "modules.order"), "kernel/fs/other.ko\n")
	for _, d := range drop {
		if err := os.Remove(filepath.Join(dir, d)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func names(mods []loadable) []string {
	var n []string
	for _, m := range mods {
		n = append(n, m.name)
	}
	return n
}

func TestNeededModules(t *testing.T) {
	mods, err := neededModules(modulesDir(t))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "failover", "net_failover", "virtio_net"}
	if diff := cmp.Diff(want, names(mods)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, m := range mods {
		if !bytes.HasPrefix(m.data, []byte("\x7fELF")) {
			t.Errorf("%s is still packed", m.name)
		}
	}
	_, err = neededModules(modulesDir(t, "kernel/drivers/block/virtio_blk.ko.zst"))
	if err == nil || !strings.Contains(err.Error(), "virtio_blk") {
		t.Errorf("without a disk driver: %v", err)
	}
}

func TestModuleOrderFaults(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "a.ko"), string(fakeModule(modinfo("b"))))
	put(t, filepath.Join(dir, "b.ko"), string(fakeModule(modinfo("a"))))
	put(t, filepath.Join(dir, "c.ko"), string(fakeModule(modinfo("absent"))))
	put(t, filepath.Join(dir, "d.ko"), "no ELF")
	put(t, filepath.Join(dir, "e.ko"), string(fakeModule("license=GPL\x00")))
	put(t, filepath.Join(dir, "f.ko.bz2"), "BZh")
	tr, err := openModuleTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a": "in a circle: a → b → a", "c": "absent is needed by c", "d": "read module d", "f": "unknown compression",
	} {
		if _, _, err := tr.order([]string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
	mods, missing, err := tr.order([]string{"e", "e", "nowhere"})
	if err != nil || len(mods) != 1 || len(missing) != 1 {
		t.Errorf("got %v, %v, %v", names(mods), missing, err)
	}
}

func FuzzModuleDepends(f *testing.F) {
	f.Add(fakeModule(modinfo("a,b-c")))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		deps, err := moduleDepends(b)
		for _, d := range deps {
			if err != nil || d == "" || strings.ContainsAny(d, ",-") {
				t.Errorf("%q, %v", deps, err)
			}
		}
	})
}

func TestSources(t *testing.T) {
	deb822 := debianSources + `
# a comment between
Types: deb deb-src
URIs: cdrom:[Debian] http://mirror.example/debian
Suites: bookworm-backports
Components: main
Enabled: no

Types: deb
URIs: http://vendor.example/apt
Suites: bookworm
Components: main
Signed-By: /etc/apt/keyrings/vendor.gpg

Types: deb
URIs: http://inline.example/debian
Suites: bookworm
Components: main
Architectures: amd64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----
`
	oneLine := `# nothing
deb [arch=amd64,i386 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg trusted=no] http://old.example/debian bookworm main non-free # tail
deb-src http://old.example/debian bookworm main
deb http://old.example/debian-security bookworm/updates main
deb [broken http://x bookworm main
deb http://short.example
deb http://other.example/apt stable main
`
	var b strings.Builder
	for _, part := range []struct {
		name string
		all  []aptSource
	}{{"deb822", parseDeb822(deb822)}, {"one line", parseOneLine(oneLine)}} {
		b.WriteString("== " + part.name + ": the release and its updates\n" + formatSources(archiveSources(part.all, "debian", "bookworm")))
		b.WriteString("== " + part.name + ": another release\n")
		if src, ok := releaseSource(archiveSources(part.all, "debian", "bookworm"), "bookworm", "trixie", ""); ok {
			b.WriteString(formatSources([]aptSource{src}))
		}
		b.WriteString("\n")
	}
	golden(t, "sources.txt", b.String())
}

func TestHostSourcesReadsBothKinds(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "sources.list"), "deb http://a.example/debian bookworm main\n")
	put(t, filepath.Join(dir, "sources.list.d/b.sources"), "Types: deb\nURIs: http://b.example\nSuites: bookworm\nComponents: main\n")
	put(t, filepath.Join(dir, "sources.list.d/c.list"), "deb http://c.example bookworm main\n")
	put(t, filepath.Join(dir, "sources.list.d/d.list.save"), "deb http://d.example bookworm main\n")
	all, err := hostSources(dir)
	if err != nil {
		t.Fatal(err)
	}
	var uris []string
	for _, s := range all {
		uris = append(uris, s.uris...)
	}
	if diff := cmp.Diff([]string{"http://a.example/debian", "http://b.example", "http://c.example"}, uris); diff != "" {
		t.Error(diff)
	}
	if all, err := hostSources(t.TempDir()); err != nil || all != nil {
		t.Errorf("no files: %v, %v", all, err)
	}
}

func FuzzSources(f *testing.F) {
	f.Add(debianSources)
	f.Add("deb [a=b] http://x y z")
	f.Fuzz(func(t *testing.T, text string) {
		for _, all := range [][]aptSource{parseDeb822(text), parseOneLine(text)} {
			formatSources(archiveSources(all, "debian", "bookworm"))
		}
	})
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		put(t, path, got)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestCommandLine(t *testing.T) {
	got := "lean: " + CommandLine(domain.Kernel{}) + "\ndebian: " + CommandLine(domain.Kernel{NeedsACPI: true}) + "\n"
	golden(t, "cmdline.txt", got)
}

func TestLostOptions(t *testing.T) {
	got := lostOptions("CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=y\nCONFIG_D=16\n# CONFIG_E=y\nCONFIG_F=n\n",
		"CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_D=8\nCONFIG_F=y\n")
	if diff := cmp.Diff([]string{"CONFIG_C", "CONFIG_D", "CONFIG_F"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestGuestConfig keeps the configuration from contradicting itself and from
// losing what no machine can do without.
func TestGuestConfig(t *testing.T) {
	seen := map[string]bool{}
	for line := range strings.Lines(guestConfig) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !strings.HasPrefix(name, "CONFIG_") {
			continue
		}
		if !ok || value == "" || seen[name] {
			t.Errorf("line %q", line)
		}
		seen[name] = true
	}
	if lost := lostOptions(strings.Join(essentialOptions, "=y\n")+"=y\n", guestConfig); len(lost) > 0 {
		t.Errorf("essential but not asked for: %v", lost)
	}
}

func TestLines(t *testing.T) {
	var got []string
	w := &lines{each: func(s string) { got = append(got, s) }}
	for _, p := range []string{"a\nb", "c\r\n", strings.Repeat("x", maxLine+10) + "\n", "unfinished"} {
		if n, err := w.Write([]byte(p)); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}
	if diff := cmp.Diff([]string{"a", "bc", "", strings.Repeat("x", maxLine)}, got); diff != "" {
		t.Error(diff)
	}
}
