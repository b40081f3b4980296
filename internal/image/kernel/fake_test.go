package kernel

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"github.com/agentiso/agentiso/internal/cmdrun"
)

// note is one ELF note.
func note(name string, typ uint32, desc []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, typ)
	b = append(b, name...)
	b = append(b, make([]byte, pad4(uint64(len(name)+1))-uint64(len(name)))...)
	b = append(b, desc...)
	return append(b, make([]byte, pad4(uint64(len(desc)))-uint64(len(desc)))...)
}

// fakeVmlinux is an ELF file with a note segment and some text behind it.
func fakeVmlinux(notes []byte, text string) []byte {
	const ehdr, phdr = 64, 56
	var b bytes.Buffer
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1,
		Phoff: ehdr, Ehsize: ehdr, Phentsize: phdr, Phnum: 1,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	p := elf.Prog64{Type: uint32(elf.PT_NOTE), Off: ehdr + phdr, Filesz: uint64(len(notes)), Memsz: uint64(len(notes)), Align: 4}
	_ = binary.Write(&b, binary.LittleEndian, h)
	_ = binary.Write(&b, binary.LittleEndian, p)
	b.Write(notes)
	b.WriteString(text)
	return b.Bytes()
}

func pvhVmlinux(text string) []byte {
	return fakeVmlinux(append(note("GNU", 3, []byte("buildid")), note("Xen", phys32Entry, make([]byte, 4))...), text)
}

const banner = "Linux version 6.1.0-56-cloud-amd64 (someone@somewhere) (gcc) #1 SMP\n"

// fakeModule is a relocatable ELF file with a .modinfo section.
func fakeModule(modinfo string) []byte {
	const ehdr, shdr = 64, 64
	names := "\x00.modinfo\x00.shstrtab\x00"
	off := uint64(ehdr + 3*shdr)
	var b bytes.Buffer
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff: ehdr, Ehsize: ehdr, Shentsize: shdr, Shnum: 3, Shstrndx: 2,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&b, binary.LittleEndian, h)
	for _, s := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: off, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: off + uint64(len(modinfo)), Size: uint64(len(names))},
	} {
		_ = binary.Write(&b, binary.LittleEndian, s)
	}
	b.WriteString(modinfo + names)
	return b.Bytes()
}

func modinfo(depends string) string {
	return "license=GPL\x00depends=" + depends + "\x00retpoline=Y\x00name=x\x00"
}

// pack compresses data as kernel or module builds do.
func pack(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var err error
	switch how {
	case "none":
		return data
	case "gzip":
		w := gzip.NewWriter(&b)
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	case "xz":
		w, werr := xz.NewWriter(&b)
		if werr != nil {
			t.Fatal(werr)
		}
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	case "zstd":
		w, werr := zstd.NewWriter(&b)
		if werr != nil {
			t.Fatal(werr)
		}
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	case "lz4":
		w := lz4.NewWriter(&b)
		if err := w.Apply(lz4.LegacyOption(true)); err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	default:
		t.Fatalf("unknown compression %s", how)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// bzImage wraps vmlinux as the kernel's build does.
func bzImage(t testing.TB, how string, vmlinux []byte) []byte {
	t.Helper()
	payload := pack(t, how, vmlinux)
	if how != "gzip" && how != "none" {
		payload = binary.LittleEndian.AppendUint32(payload, uint32(len(vmlinux)))
	}
	const sects, offset = 3, 100
	img := make([]byte, (sects+1)*sector+offset)
	img[offSetupSects] = sects
	copy(img[offHeaderMagic:], headerMagic)
	binary.LittleEndian.PutUint16(img[offVersion:], 0x020f)
	binary.LittleEndian.PutUint32(img[offPayloadOffset:], offset)
	binary.LittleEndian.PutUint32(img[offPayloadLength:], uint32(len(payload)))
	return append(append(img, payload...), "trailing code"...)
}

// fakeHost is a Debian host without a network: an archive of a few packages
// behind apt's commands, and programs that do what a test says.
type fakeHost struct {
	t        *testing.T
	packages map[string]string // name → what apt-cache shows
	trees    map[string]func(dir string)
	programs map[string]func(ctx context.Context, c cmdrun.Command) error
	absent   map[string]bool
	ran      []string
}

func newFakeHost(t *testing.T) *fakeHost {
	return &fakeHost{
		t: t, packages: map[string]string{}, trees: map[string]func(string){},
		programs: map[string]func(context.Context, cmdrun.Command) error{}, absent: map[string]bool{},
	}
}

// pkg adds a package whose unpacked tree tree makes.
func (h *fakeHost) pkg(name, version, depends string, tree func(dir string)) {
	h.packages[name] = fmt.Sprintf("Package: %s\nVersion: %s\nDepends: %s\nSize: 1000\nFilename: pool/x.deb\n\n", name, version, depends)
	h.trees[name] = tree
}

func (h *fakeHost) run(ctx context.Context, c cmdrun.Command) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	argv := c.Argv
	if argv[0] == "nice" {
		argv = argv[3:]
	}
	h.ran = append(h.ran, argv[0]+" "+argv[len(argv)-1])
	if f := h.programs[argv[0]]; f != nil {
		return f(ctx, c)
	}
	last := argv[len(argv)-1]
	switch argv[0] {
	case "apt-get":
		if last == "update" {
			return nil
		}
		name, version, _ := strings.Cut(last, "=")
		fmt.Fprintf(c.Stdout, "dlstatus:1:50.0:Retrieving file 1 of 1\nFetched\n")
		return os.WriteFile(filepath.Join(c.Dir, name+"_"+strings.ReplaceAll(version, ":", "%3a")+"_amd64.deb"), []byte(name), 0o644)
	case "apt-cache":
		text, ok := h.packages[last]
		if !ok {
			return &cmdrun.Error{Argv: argv, Stderr: "E: No packages found", Err: errors.New("exit status 100")}
		}
		_, err := c.Stdout.Write([]byte(text))
		return err
	case "dpkg-deb":
		name, err := os.ReadFile(argv[2])
		if err != nil {
			return err
		}
		h.trees[string(name)](argv[3])
		return nil
	}
	return nil
}

func (h *fakeHost) look(program string) error {
	if h.absent[program] {
		return os.ErrNotExist
	}
	return nil
}

const debianRelease = "ID=debian\nVERSION_CODENAME=bookworm\n"

const debianSources = `Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
`

// newStore opens a store on a fake host.
func newStore(t *testing.T) (*Store, *fakeHost) {
	t.Helper()
	root := t.TempDir()
	put(t, filepath.Join(root, "etc/os-release"), debianRelease)
	put(t, filepath.Join(root, "etc/apt/sources.list.d/debian.sources"), debianSources)
	for _, h := range leanHeaders {
		put(t, filepath.Join(root, h.program), "")
	}
	agent := filepath.Join(t.TempDir(), "agentiso-guest")
	put(t, agent, "agent")
	s, err := Open(Options{Dir: filepath.Join(t.TempDir(), "kernels"), AgentPath: agent, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	fh := newFakeHost(t)
	s.host = host{root: root, run: fh.run, look: fh.look}
	return s, fh
}

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tree lists the files below dir, sorted, relative.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		names = append(names, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
