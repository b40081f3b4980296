package image

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/image/ext4"
)

// maxBusybox bounds the program; Debian's has 2 MB.
const maxBusybox = 64 << 20

// minimalFiles are all that the minimal image has beside busybox.
var minimalFiles = []File{
	{Path: "etc/passwd", Data: []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n")},
	{Path: "etc/group", Data: []byte("root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n")},
	{Path: "etc/shadow", Mode: 0o600, Data: []byte("root:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n")},
	{Path: "etc/shells", Data: []byte("/bin/sh\n/bin/ash\n")},
	{Path: "etc/hostname", Data: []byte("localhost\n")},
	{Path: "etc/hosts", Data: []byte("127.0.0.1\tlocalhost\n::1\tlocalhost\n")},
	{Path: "etc/resolv.conf"},
	{Path: "etc/profile", Data: []byte("export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\u@\\h:\\w\\$ '\n")},
	{Path: "etc/os-release", Data: []byte("ID=agentiso-minimal\nNAME=\"agentiso minimal\"\nPRETTY_NAME=\"agentiso minimal (busybox)\"\n")},
}

var minimalDirs = []struct {
	path     string
	mode     uint32
	uid, gid uint32
}{
	{"/", 0o755, 0, 0},
	{"dev", 0o755, 0, 0}, {"proc", 0o555, 0, 0}, {"sys", 0o555, 0, 0}, {"run", 0o755, 0, 0}, {"mnt", 0o755, 0, 0},
	{"tmp", 0o1777, 0, 0}, {"var/tmp", 0o1777, 0, 0}, {"var/log", 0o755, 0, 0},
	{"root", 0o700, 0, 0}, {"home/user", 0o755, 1000, 1000},
	{"usr/local/bin", 0o755, 0, 0},
}

// buildMinimal makes the busybox image.
func (s *Store) buildMinimal(ctx context.Context, st *stage, p domain.ProgressFunc) error {
	p.Report(domain.Progress{Stage: "finding busybox"})
	program, err := s.busybox(ctx, filepath.Join(st.dir, "busybox"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	list, err := cmdrun.Host(ctx, program, "--list-full")
	if err != nil {
		return fmt.Errorf("list applets: %w", err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	for _, d := range minimalDirs {
		if err := st.fs.Mkdir(d.path, ext4.Attr{Mode: d.mode, UID: d.uid, GID: d.gid}); err != nil {
			return err
		}
	}
	if err := st.fs.File("bin/busybox", ext4.Attr{Mode: 0o755}, int64(len(data)), bytes.NewReader(data)); err != nil {
		return err
	}
	for applet := range strings.FieldsSeq(string(list)) {
		// Applet names are paths like usr/bin/awk; linuxrc is for another boot.
		if name := path.Clean("/" + applet); name != "/linuxrc" && name != "/bin/busybox" {
			if err := st.fs.Symlink(name, "/bin/busybox", ext4.Attr{}); err != nil {
				return err
			}
		}
	}
	return errors.Join(st.put(minimalFiles), os.RemoveAll(filepath.Join(st.dir, "busybox")))
}

// put writes files over what the image has.
func (st *stage) put(files []File) error {
	for _, f := range files {
		var err error
		if f.Target != "" {
			err = st.fs.Symlink(f.Path, f.Target, ext4.Attr{})
		} else {
			mode := f.Mode
			if mode == 0 {
				mode = 0o644
			}
			err = st.fs.File(f.Path, ext4.Attr{Mode: mode}, int64(len(f.Data)), bytes.NewReader(f.Data))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// busybox finds a static busybox: the one of the options, the host's, or the
// one of Debian's package, which is downloaded into dir and not installed.
func (s *Store) busybox(ctx context.Context, dir string) (string, error) {
	if s.o.Busybox != "" {
		if !isStatic(s.o.Busybox) {
			return "", fault.New(fault.Invalid, "%s is not a statically linked program", s.o.Busybox).
				WithNext("Use the one of the package busybox-static.")
		}
		return s.o.Busybox, nil
	}
	for _, path := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		if isStatic(path) {
			return path, nil
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	program := filepath.Join(dir, "busybox")
	if err := downloadBusybox(ctx, dir, program); err != nil {
		if _, ok := errors.AsType[*fault.Error](err); ok || ctx.Err() != nil {
			return "", err
		}
		return "", fault.New(fault.Missing, "no static busybox on the host, and it could not be downloaded: %w", err).
			WithNext("Install it: sudo apt-get install busybox-static")
	}
	return program, nil
}

// isStatic reports whether path is a program that needs no interpreter.
func isStatic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return f.Type == elf.ET_EXEC || f.Type == elf.ET_DYN
}

// downloadBusybox needs no root: apt keeps its lists below dir if the host's
// are not there.
func downloadBusybox(ctx context.Context, dir, program string) error {
	const pkg = "busybox-static"
	ctx, cancel := context.WithTimeout(ctx, 5*probeLimit)
	defer cancel()
	apt := func(args ...string) error {
		return cmdrun.Stream(ctx, cmdrun.Command{Argv: append([]string{"apt-get", "-q"}, args...), Dir: dir, Stdout: io.Discard})
	}
	if err := apt("download", pkg); err != nil {
		lists := filepath.Join(dir, "lists")
		if err := os.MkdirAll(filepath.Join(lists, "partial"), 0o755); err != nil {
			return err
		}
		private := []string{"-o", "Dir::State::Lists=" + lists, "-o", "Dir::Cache=" + dir, "-o", "APT::Sandbox::User="}
		if err := apt(append(private, "update")...); err != nil {
			return err
		}
		if err := apt(append(private, "download", pkg)...); err != nil {
			return err
		}
	}
	debs, err := filepath.Glob(filepath.Join(dir, pkg+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages: %w", len(debs), err)
	}
	var content bytes.Buffer
	if err := cmdrun.Stream(ctx, cmdrun.Command{Argv: []string{"dpkg-deb", "--fsys-tarfile", debs[0]}, Stdout: &content}); err != nil {
		return err
	}
	for tr := tar.NewReader(&content); ; {
		h, err := tr.Next()
		if err != nil {
			return fmt.Errorf("no busybox in %s: %w", filepath.Base(debs[0]), err)
		}
		if path.Base(h.Name) != "busybox" || h.Typeflag != tar.TypeReg || h.Size > maxBusybox || path.Base(path.Dir(h.Name)) != "bin" {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		return os.WriteFile(program, data, 0o755)
	}
}
