package kernel

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// guestConfig is the configuration that the lean kernel is built from.
//
//go:embed guest.config
var guestConfig string

const (
	// The source package, and the release of Debian that has it.
	leanPackage = "linux-source-6.12"
	leanRelease = "trixie"
	// leanSteps is how many lines about a finished object a build prints: 2000
	// with 861 options, 2137 with today's. It only scales the progress bar.
	leanSteps = 2137
	// leanSpace is what a build needs: 154 MB of download and 2.0 GB of source
	// and objects.
	leanSpace = 3 << 30
	// buildNice keeps a build out of the way of running machines.
	buildNice = "10"
)

// leanTools is what the build runs, beside a shell and coreutils.
var leanTools = []tool{
	{"apt-get", "apt"}, {"apt-cache", "apt"}, {"dpkg-deb", "dpkg"},
	{"tar", "tar"}, {"xz", "xz-utils"}, {"make", "make"}, {"gcc", "gcc"}, {"ld", "binutils"},
	{"strip", "binutils"}, {"flex", "flex"}, {"bison", "bison"}, {"bc", "bc"}, {"perl", "perl"},
	{"cmp", "diffutils"}, {"find", "findutils"}, {"awk", "mawk"},
}

// leanHeaders is what it includes: the kernel's objtool reads ELF with libelf.
var leanHeaders = []tool{
	{"usr/include/gelf.h", "libelf-dev"},
	{"usr/include/stdio.h", "libc6-dev"},
}

// essentialOptions are those without which no machine boots. A later source may
// have renamed them.
var essentialOptions = []string{
	"CONFIG_64BIT", "CONFIG_PVH", "CONFIG_VIRTIO_MMIO", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES", "CONFIG_VIRTIO_BLK",
	"CONFIG_VIRTIO_NET", "CONFIG_VIRTIO_CONSOLE", "CONFIG_EXT4_FS", "CONFIG_BLK_DEV_INITRD", "CONFIG_DEVTMPFS",
	"CONFIG_SERIAL_8250_CONSOLE", "CONFIG_BINFMT_ELF", "CONFIG_UNIX", "CONFIG_INET",
}

// BuildLean builds the lean kernel from Debian's source of Linux, with what
// machines need built in and nothing else, and makes it the default. It takes
// some ten minutes on two cores and needs no root. jobs bounds the compiler's
// processes; 0 is the number of cores. A lean kernel that the store has from the
// same configuration is returned at once; force builds it again from the newest
// source. A build that fails or is cancelled leaves its download and no more.
func (s *Store) BuildLean(ctx context.Context, jobs int, force bool, p domain.ProgressFunc) (domain.Kernel, error) {
	if err := s.acquire(ctx); err != nil {
		return domain.Kernel{}, err
	}
	defer s.letGo()
	if !force {
		if k, ok := s.leanInStore(); ok {
			return k, s.SetDefault(LeanName)
		}
	}
	if missing := s.missingForLean(); len(missing) > 0 {
		return domain.Kernel{}, missingTools(missing)
	}
	if err := s.needSpace(leanSpace); err != nil {
		return domain.Kernel{}, err
	}
	rel, err := s.host.release()
	if err != nil {
		return domain.Kernel{}, err
	}
	source, err := s.leanSource(rel)
	if err != nil {
		return domain.Kernel{}, err
	}
	a, err := s.host.newApt(s.path("apt", "lean"), []aptSource{source})
	if err != nil {
		return domain.Kernel{}, noSpace(err)
	}
	if err := a.update(ctx, p); err != nil {
		return domain.Kernel{}, err
	}
	pkg, ok, err := a.show(ctx, leanPackage)
	if err != nil {
		return domain.Kernel{}, err
	}
	if !ok {
		return domain.Kernel{}, fault.New(fault.Missing, "Debian %s has no package %s at the host's mirror", leanRelease, leanPackage).
			WithNext("Check the mirror, or fetch the distribution's kernel with `agentiso kernel fetch`.")
	}
	deb, err := a.download(ctx, pkg, p)
	if err != nil {
		return domain.Kernel{}, err
	}
	vmlinux, err := s.compile(ctx, deb, jobs, p)
	if err != nil {
		return domain.Kernel{}, err
	}
	p.Report(domain.Progress{Stage: "publish kernel"})
	k, err := s.publish(ctx, newKernel{
		name: LeanName, source: pkg.name + " " + pkg.version, recipe: leanRecipe(), vmlinux: vmlinux, makeDefault: true,
	})
	if err != nil {
		return domain.Kernel{}, err
	}
	if err := a.clean(); err != nil {
		s.log.Warn("remove downloads", "err", err)
	}
	return k, nil
}

// leanRecipe names the configuration that a lean kernel was built from.
func leanRecipe() string {
	sum := sha256.Sum256([]byte(guestConfig))
	return "config:" + hex.EncodeToString(sum[:])
}

// leanInStore is the lean kernel, if it is of today's configuration.
func (s *Store) leanInStore() (domain.Kernel, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.load(LeanName)
	if err != nil || m.Recipe != leanRecipe() {
		return domain.Kernel{}, false
	}
	return m.kernel(LeanName, s.dirOf(m)), true
}

func (s *Store) missingForLean() []string {
	pkgs := s.missingPrograms(leanTools)
	for _, h := range leanHeaders {
		if _, err := os.Stat(filepath.Join(s.host.root, h.program)); err != nil {
			pkgs = append(pkgs, h.pkg)
		}
	}
	return pkgs
}

// needSpace checks that the store's file system has room.
func (s *Store) needSpace(bytes uint64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.opt.Dir, &st); err != nil {
		return fmt.Errorf("look at free space: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < bytes {
		return fault.New(fault.NoSpace, "%s has %d MiB free; the build needs %d", s.opt.Dir, free>>20, bytes>>20).
			WithNext("Free some space there.")
	}
	return nil
}

// leanSource is where the kernel's source comes from: the server that the host
// itself uses for Debian, at another release.
func (s *Store) leanSource(rel release) (aptSource, error) {
	if s.opt.Mirror != "" {
		return aptSource{
			uris: []string{s.opt.Mirror}, suites: []string{leanRelease}, components: []string{"main"}, signedBy: s.opt.Keyring,
		}, nil
	}
	if rel.family() == "debian" {
		all, err := hostSources(filepath.Join(s.host.root, "etc/apt"))
		if err != nil {
			return aptSource{}, err
		}
		if src, ok := releaseSource(archiveSources(all, "debian", rel.codename), rel.codename, leanRelease, s.opt.Keyring); ok {
			return src, nil
		}
	}
	return aptSource{}, fault.New(fault.Missing, "the host's package sources name no Debian archive to take %s from", leanPackage).
		WithNext("Build on a Debian host, or use the distribution's kernel: `agentiso kernel fetch`.")
}

// compile unpacks the source, configures and builds it, and returns the
// stripped vmlinux. Its tree is gone when it returns.
func (s *Store) compile(ctx context.Context, deb string, jobs int, p domain.ProgressFunc) (image []byte, err error) {
	if jobs <= 0 {
		jobs = runtime.NumCPU()
	}
	tmp, err := os.MkdirTemp(s.path("tmp"), "lean-*")
	if err != nil {
		return nil, noSpace(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	src := filepath.Join(tmp, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		return nil, noSpace(err)
	}
	run := func(stage string, watch func(string), argv ...string) error {
		w := &lines{each: func(l string) {
			if watch != nil {
				watch(l)
			}
			p.Report(domain.Progress{Stage: stage, Log: l})
		}}
		err := s.host.run(ctx, cmdrun.Command{
			Argv: append([]string{"nice", "-n", buildNice}, argv...), Dir: src, Stdout: w,
			// Nothing of this host or hour goes into the kernel, so that equal
			// sources, configurations and compilers make equal kernels.
			Env: []string{"KBUILD_BUILD_USER=agentiso", "KBUILD_BUILD_HOST=agentiso",
				"KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970", "MAKEFLAGS=", "KCONFIG_CONFIG=.config"},
		})
		if err != nil {
			return buildFault(ctx, stage, err)
		}
		return nil
	}
	p.Report(domain.Progress{Stage: "unpack source"})
	if err := run("unpack source", nil, "dpkg-deb", "-x", deb, filepath.Join(tmp, "deb")); err != nil {
		return nil, err
	}
	tarball := filepath.Join(tmp, "deb/usr/src", leanPackage+".tar.xz")
	if err := run("unpack source", nil, "tar", "-xf", tarball, "-C", src, "--strip-components=1"); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(filepath.Join(tmp, "deb")); err != nil {
		return nil, err
	}
	if err := s.configure(src, run); err != nil {
		return nil, err
	}
	var built int64
	count := func(line string) {
		if objectRE.MatchString(line) {
			built++
			p.Report(domain.Progress{Stage: "compile", Done: min(built, leanSteps), Total: leanSteps})
		}
	}
	if err := run("compile", count, "make", "-j"+strconv.Itoa(jobs), "vmlinux"); err != nil {
		return nil, err
	}
	if err := run("strip", nil, "strip", "-o", "vmlinux.stripped", "vmlinux"); err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(src, "vmlinux.stripped"))
}

// objectRE is a line that make prints for a finished step.
var objectRE = regexp.MustCompile(`^  (CC|AS|AR|LD|HOSTCC)\s`)

// configure writes the tree's .config and checks what came of it: an option
// whose dependencies are not met is dropped without a word by kconfig.
func (s *Store) configure(src string, run func(string, func(string), ...string) error) error {
	const stage = "configure"
	if err := os.WriteFile(filepath.Join(src, "guest.config"), []byte(guestConfig), 0o644); err != nil {
		return noSpace(err)
	}
	for _, argv := range [][]string{
		{"make", "allnoconfig"},
		{"scripts/kconfig/merge_config.sh", "-m", ".config", "guest.config"},
		{"make", "olddefconfig"},
	} {
		if err := run(stage, nil, argv...); err != nil {
			return err
		}
	}
	got, err := os.ReadFile(filepath.Join(src, ".config"))
	if err != nil {
		return err
	}
	lost := lostOptions(guestConfig, string(got))
	for _, o := range essentialOptions {
		if slices.Contains(lost, o) {
			return fmt.Errorf("configure kernel: this source has no %s under our configuration", o)
		}
	}
	if len(lost) > 0 {
		s.log.Warn("kernel source does not take all options", "lost", strings.Join(lost, " "))
	}
	return nil
}

// lostOptions lists the options that want sets and got does not have so.
func lostOptions(want, got string) []string {
	have := parseConfig(got)
	var lost []string
	for name, value := range parseConfig(want) {
		if v, ok := have[name]; value == "n" && ok && v != "n" || value != "n" && v != value {
			lost = append(lost, name)
		}
	}
	slices.Sort(lost)
	return lost
}

// parseConfig reads CONFIG_X=value lines.
func parseConfig(text string) map[string]string {
	opts := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, value, ok := strings.Cut(line, "="); ok && strings.HasPrefix(name, "CONFIG_") {
			opts[name] = value
		}
	}
	return opts
}

// buildFault says which stage of a build failed and why.
func buildFault(ctx context.Context, stage string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("build lean kernel: %s: %w", stage, ctx.Err())
	}
	var e *cmdrun.Error
	if errors.As(err, &e) && strings.Contains(e.Stderr, "No space left") {
		return fault.New(fault.NoSpace, "build lean kernel: %s: the disk is full: %w", stage, err).
			WithNext("Free some space where the data directory is.")
	}
	return fmt.Errorf("build lean kernel: %s: %w", stage, err)
}
