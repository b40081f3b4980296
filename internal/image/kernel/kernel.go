// Package kernel keeps guest kernels: it fetches the distribution's, builds the
// lean one, takes what somebody built elsewhere, and answers what a machine
// boots from.
//
// A kernel is a directory that is written once: vmlinux, the modules that the
// agent has to load and in which order, and a manifest. The directory is named
// by the digest of its content and appears by rename, so it is whole or absent;
// a name is a small file that says which. A failed or cancelled fetch or build
// leaves only what it has downloaded.
//
// Layout of Options.Dir:
//
//	kernels/HEX/{kernel.json,vmlinux,NAME.ko…}
//	names/NAME            "HEX\n"
//	default               "NAME\n"
//	initrd/HEX.cpio       package initrd's cache
//	apt/                  private apt state and downloaded packages
//	tmp/                  work in progress; emptied by Open
//
// Not its job: starting QEMU, and what the agent does inside (guest/boot).
//
// Lock order: Store.work (one fetch or build at a time), then Store.mu (the
// names). Store.mu is not held while a program runs.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/image/initrd"
)

// LeanName is the name of the kernel that BuildLean makes.
const LeanName = "lean"

// Options configure a Store.
type Options struct {
	// Dir is the store's own directory. One process at a time.
	Dir string
	// AgentPath is the static agent binary that becomes /init.
	AgentPath string
	// KernelPath and InitrdPath, when set, are what every machine boots from
	// instead of the store's: [vm] kernel and initrd of the configuration.
	KernelPath string
	InitrdPath string
	// Keyring is the path of the key ring that verifies the lists of the lean
	// kernel's source; "" is the one that the host's own source of the same
	// archive names, or apt's trusted keys.
	Keyring string
	// Mirror is the URI of a Debian archive for the lean kernel's source, for
	// hosts whose own sources name none; "" elsewhere.
	Mirror string
	Log    *slog.Logger
}

// Store is the kernels of one data directory. Its methods may be called
// concurrently.
type Store struct {
	opt    Options
	initrd *initrd.Cache
	log    *slog.Logger

	host host
	work chan struct{} // one fetch or build at a time; full: somebody is at it

	mu sync.Mutex // names, default and pruning
	// custom remembers what KernelPath was found to be, by what stat said.
	custom customKernel
}

// Open opens the store in o.Dir, making it if need be, and clears what an
// earlier process left unfinished.
func Open(o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{opt: o, log: o.Log, host: realHost(), work: make(chan struct{}, 1)}
	if err := os.RemoveAll(s.path("tmp")); err != nil {
		return nil, fmt.Errorf("open kernel store: %w", err)
	}
	for _, d := range []string{"kernels", "names", "tmp"} {
		if err := os.MkdirAll(s.path(d), 0o755); err != nil {
			return nil, fmt.Errorf("open kernel store: %w", err)
		}
	}
	var err error
	if s.initrd, err = initrd.OpenCache(s.path("initrd"), o.Log); err != nil {
		return nil, err
	}
	return s, nil
}

// acquire waits for the right to fetch or build.
func (s *Store) acquire(ctx context.Context) error {
	select {
	case s.work <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another fetch or build of a kernel: %w", ctx.Err())
	}
}

func (s *Store) letGo() { <-s.work }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.opt.Dir}, elem...)...)
}

// Boot returns what a machine boots from: the kernel called name ("" is the
// default), the initrd with the agent and the kernel's modules, and what the
// kernel wants on its command line. An override of the options comes before the
// default, and an explicit name before an override.
//
// Append is [CommandLine] of the kernel. What depends on the machine (console,
// accelerator, agentiso.init and agentiso.link) is its owner's to add.
func (s *Store) Boot(ctx context.Context, name string) (domain.Boot, error) {
	var k domain.Kernel
	var mods []initrd.Module
	var err error
	if name == "" && s.opt.KernelPath != "" {
		k, err = s.override()
	} else {
		k, mods, err = s.lookup(name)
	}
	if err != nil {
		return domain.Boot{}, err
	}
	b := domain.Boot{Kernel: k, Append: CommandLine(k)}
	if s.opt.InitrdPath != "" {
		if _, err := os.Stat(s.opt.InitrdPath); err != nil {
			return domain.Boot{}, fault.New(fault.Missing, "initrd %s of the configuration: %w", s.opt.InitrdPath, err).
				WithNext("Correct initrd in section [vm], or remove it to have the initrd made.")
		}
		b.Initrd = s.opt.InitrdPath
		return b, nil
	}
	if _, err := os.Stat(s.opt.AgentPath); err != nil {
		return domain.Boot{}, fault.New(fault.Missing, "guest agent %s: %w", s.opt.AgentPath, err).
			WithNext("Run `make build`, which puts agentiso-guest beside agentiso.")
	}
	b.Initrd, err = s.initrd.Path(ctx, initrd.Contents{Agent: s.opt.AgentPath, Modules: mods})
	return b, err
}

// Kernels lists the kernels by name, and the name of the default: "" without
// one.
func (s *Store) Kernels(ctx context.Context) (list []domain.Kernel, defaultName string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ents, err := os.ReadDir(s.path("names"))
	if err != nil {
		return nil, "", fmt.Errorf("list kernels: %w", err)
	}
	for _, e := range ents {
		if err := ctx.Err(); err != nil {
			return nil, "", err
		}
		if !nameRE.MatchString(e.Name()) {
			continue
		}
		m, err := s.load(e.Name())
		if err != nil {
			s.log.Warn("skip unreadable kernel", "kernel", e.Name(), "err", err)
			continue
		}
		list = append(list, m.kernel(e.Name(), s.dirOf(m)))
	}
	return list, s.defaultName(), nil
}

// SetDefault makes name the kernel that machines boot which ask for none.
func (s *Store) SetDefault(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.load(name); err != nil {
		return s.unknown(name, err)
	}
	return s.point("default", name)
}

// nameRE is what a kernel may be called: it is also a file's name.
var nameRE = regexp.MustCompile(`^[a-z0-9][a-zA-Z0-9._+~-]{0,127}$`)

func (s *Store) lookup(name string) (domain.Kernel, []initrd.Module, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := name
	if name == "" {
		name = s.defaultName()
	}
	if name == "" {
		return domain.Kernel{}, nil, fault.New(fault.Missing, "there is no guest kernel yet").
			WithNext("Run `agentiso kernel fetch` for the distribution's, or `agentiso kernel build` for the lean one.")
	}
	m, err := s.load(name)
	if err != nil {
		if asked == "" {
			asked = name
		}
		return domain.Kernel{}, nil, s.unknown(asked, err)
	}
	dir := s.dirOf(m)
	mods := make([]initrd.Module, len(m.Modules))
	for i, mod := range m.Modules {
		mods[i] = initrd.Module{Name: mod.Name, Path: filepath.Join(dir, mod.Name+".ko"), Digest: mod.Digest}
	}
	return m.kernel(name, dir), mods, nil
}

func (s *Store) unknown(name string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("load kernel %s: %w", name, err)
	}
	return &fault.Error{
		Kind: fault.NotFound, Msg: fmt.Sprintf("no kernel is called %q", name), Err: err,
		Next: "`agentiso kernel ls` lists those that there are; `agentiso kernel fetch` and `agentiso kernel build` make one.",
	}
}
