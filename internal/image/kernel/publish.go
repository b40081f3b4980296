package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	manifestFile = "kernel.json"
	vmlinuxFile  = "vmlinux"
	// pruneAge is how long a kernel that no name stands for is kept: a machine
	// that is starting has just been given its path.
	pruneAge = time.Hour
)

// manifest is kernel.json.
type manifest struct {
	Release     string           `json:"release"`
	Digest      string           `json:"digest"` // of vmlinux
	Source      string           `json:"source"`
	Recipe      string           `json:"recipe,omitempty"` // what a build was made from, to know it again
	PVH         bool             `json:"pvh"`
	NeedsACPI   bool             `json:"needs_acpi"`
	SizeBytes   int64            `json:"size_bytes"`
	CreatedAt   time.Time        `json:"created_at"`
	Modules     []manifestModule `json:"modules"`
	contentName string           // of the directory
}

type manifestModule struct {
	Name   string `json:"name"`
	Digest string `json:"digest"`
}

func (m *manifest) kernel(name, dir string) domain.Kernel {
	return domain.Kernel{
		Name: name, Release: m.Release, Digest: m.Digest, Source: m.Source,
		Path: filepath.Join(dir, vmlinuxFile), NeedsACPI: m.NeedsACPI, PVH: m.PVH,
		SizeBytes: m.SizeBytes, CreatedAt: m.CreatedAt,
	}
}

func (s *Store) dirOf(m *manifest) string { return s.path("kernels", m.contentName) }

// newKernel is what publish makes a kernel of.
type newKernel struct {
	name        string
	source      string
	recipe      string
	vmlinux     []byte
	modules     []loadable
	makeDefault bool // else only when there is no default
}

// publish adds a kernel under its name. Content that is there already is used
// again. The name moves last, in one rename.
func (s *Store) publish(ctx context.Context, n newKernel) (domain.Kernel, error) {
	if !nameRE.MatchString(n.name) {
		return domain.Kernel{}, fault.New(fault.Invalid, "kernel name %q: want lower-case letters, digits and . _ + ~ -", n.name)
	}
	facts, err := inspectVmlinux(n.vmlinux)
	if err != nil {
		return domain.Kernel{}, fault.New(fault.Invalid, "kernel %s: %w", n.name, err).
			WithNext("Use an x86-64 vmlinux or bzImage.")
	}
	if !facts.PVH {
		return domain.Kernel{}, fault.New(fault.Unsupported,
			"kernel %s (%s) has no PVH entry point (Xen ELF note 18): QEMU cannot start it directly", n.name, facts.Release).
			WithNext("Use a kernel built with CONFIG_PVH=y.")
	}
	m := &manifest{
		Release: facts.Release, Digest: digest(n.vmlinux), Source: n.source, Recipe: n.recipe,
		PVH: true, NeedsACPI: !facts.MMIOCmdline, SizeBytes: int64(len(n.vmlinux)), CreatedAt: time.Now().UTC(),
	}
	content := sha256.New()
	fmt.Fprintf(content, "vmlinux %s\n", m.Digest)
	for _, mod := range n.modules {
		mm := manifestModule{mod.name, digest(mod.data)}
		m.Modules = append(m.Modules, mm)
		fmt.Fprintf(content, "module %s %s\n", mm.Name, mm.Digest)
	}
	fmt.Fprintf(content, "recipe %s\n", n.recipe)
	m.contentName = hex.EncodeToString(content.Sum(nil))

	if err := ctx.Err(); err != nil {
		return domain.Kernel{}, err
	}
	if err := s.writeKernel(m, n); err != nil {
		return domain.Kernel{}, fmt.Errorf("publish kernel %s: %w", n.name, noSpace(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.point(filepath.Join("names", n.name), m.contentName); err != nil {
		return domain.Kernel{}, fmt.Errorf("publish kernel %s: %w", n.name, err)
	}
	if n.makeDefault || s.defaultName() == "" {
		if err := s.point("default", n.name); err != nil {
			return domain.Kernel{}, fmt.Errorf("publish kernel %s: %w", n.name, err)
		}
	}
	s.prune()
	// What is on the disk counts: with known content the older manifest.
	got, err := s.load(n.name)
	if err != nil {
		return domain.Kernel{}, fmt.Errorf("publish kernel %s: %w", n.name, err)
	}
	return got.kernel(n.name, s.dirOf(got)), nil
}

func (s *Store) writeKernel(m *manifest, n newKernel) (err error) {
	final := s.dirOf(m)
	if _, err := os.Stat(filepath.Join(final, manifestFile)); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(s.path("tmp"), "kernel-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // nothing is left there after the rename
	// QEMU may run as another user than the daemon.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	files := map[string][]byte{vmlinuxFile: n.vmlinux}
	for _, mod := range n.modules {
		files[mod.name+".ko"] = mod.data
	}
	if files[manifestFile], err = json.MarshalIndent(m, "", "  "); err != nil {
		return err
	}
	for name, data := range files {
		if err := writeSynced(filepath.Join(tmp, name), data); err != nil {
			return err
		}
	}
	// The loser of a race for the same content finds the winner's.
	if err := os.Rename(tmp, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// load reads the manifest of the kernel called name; fs.ErrNotExist if there is
// none.
func (s *Store) load(name string) (*manifest, error) {
	if !nameRE.MatchString(name) {
		return nil, fs.ErrNotExist
	}
	text, err := os.ReadFile(s.path("names", name))
	if err != nil {
		return nil, err
	}
	content := strings.TrimSpace(string(text))
	if !isHex(content) {
		return nil, fmt.Errorf("names/%s is damaged: %q", name, content)
	}
	if text, err = os.ReadFile(s.path("kernels", content, manifestFile)); err != nil {
		return nil, err
	}
	m := &manifest{contentName: content}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("read manifest of kernel %s: %w", name, err)
	}
	return m, nil
}

// defaultName is "" when there is no default, or it stands for nothing.
func (s *Store) defaultName() string {
	text, err := os.ReadFile(s.path("default"))
	if err != nil {
		return ""
	}
	name := strings.TrimSpace(string(text))
	if _, err := s.load(name); err != nil {
		return ""
	}
	return name
}

// point replaces a one-line file.
func (s *Store) point(file, value string) error {
	tmp := s.path("tmp", "point")
	if err := writeSynced(tmp, []byte(value+"\n")); err != nil {
		return err
	}
	return os.Rename(tmp, s.path(file))
}

// prune removes kernels that have no name any more.
func (s *Store) prune() {
	named := map[string]bool{}
	names, err := os.ReadDir(s.path("names"))
	if err != nil {
		return
	}
	for _, e := range names {
		if text, err := os.ReadFile(s.path("names", e.Name())); err == nil {
			named[strings.TrimSpace(string(text))] = true
		}
	}
	dirs, err := os.ReadDir(s.path("kernels"))
	if err != nil {
		return
	}
	for _, d := range dirs {
		fi, err := d.Info()
		if err != nil || named[d.Name()] || time.Since(fi.ModTime()) < pruneAge {
			continue
		}
		if err := os.RemoveAll(s.path("kernels", d.Name())); err != nil {
			s.log.Warn("remove kernel without a name", "kernel", d.Name(), "err", err)
		}
	}
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func isHex(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}
