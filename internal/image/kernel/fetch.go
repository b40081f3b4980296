package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// metaPackages stand for each distribution's newest kernel for virtual
// machines. Ubuntu's has not been tried.
var metaPackages = map[string]string{
	"debian": "linux-image-cloud-amd64",
	"ubuntu": "linux-image-virtual",
}

// Fetch makes the distribution's kernel for virtual machines available. It
// downloads the package and unpacks it; nothing is installed and no root is
// needed. When the store has one already it is returned at once, unless force:
// then a newer one is looked for. The first kernel of a store becomes its
// default, and a newer one of the same distribution takes that over.
func (s *Store) Fetch(ctx context.Context, force bool, p domain.ProgressFunc) (domain.Kernel, error) {
	if err := s.acquire(ctx); err != nil {
		return domain.Kernel{}, err
	}
	defer s.letGo()
	rel, err := s.host.release()
	if err != nil {
		return domain.Kernel{}, err
	}
	family := rel.family()
	meta, ok := metaPackages[family]
	if !ok {
		return domain.Kernel{}, fault.New(fault.Unsupported, "no kernel package is known for the distribution %q", rel.id).
			WithNext("Use Debian or Ubuntu, or give the path of a kernel as kernel in section [vm].")
	}
	if !force {
		if k, ok := s.newestFetched(ctx, family); ok {
			return k, nil
		}
	}
	if missing := s.missingPrograms([]tool{{"apt-get", "apt"}, {"apt-cache", "apt"}, {"dpkg-deb", "dpkg"}}); len(missing) > 0 {
		return domain.Kernel{}, missingTools(missing)
	}
	sources, err := s.archive(rel)
	if err != nil {
		return domain.Kernel{}, err
	}
	a, err := s.host.newApt(s.path("apt", family), sources)
	if err != nil {
		return domain.Kernel{}, noSpace(err)
	}
	if err := a.update(ctx, p); err != nil {
		return domain.Kernel{}, err
	}
	pkgs, err := kernelPackages(ctx, a, meta)
	if err != nil {
		return domain.Kernel{}, err
	}
	image := pkgs[0]
	source := image.name + " " + image.version
	if k, ok := s.bySource(ctx, source); ok {
		return k, a.clean()
	}
	k, err := s.fetchPackages(ctx, a, family, source, pkgs, p)
	if err != nil {
		return domain.Kernel{}, err
	}
	if err := a.clean(); err != nil {
		s.log.Warn("remove downloads", "err", err)
	}
	return k, nil
}

// archive is the host's own archive for its own release.
func (s *Store) archive(rel release) ([]aptSource, error) {
	all, err := hostSources(filepath.Join(s.host.root, "etc/apt"))
	if err != nil {
		return nil, err
	}
	sources := archiveSources(all, rel.family(), rel.codename)
	if len(sources) == 0 {
		return nil, fault.New(fault.Missing, "the host's package sources name no archive of %s %s", rel.id, rel.codename).
			WithNext("Add the distribution's archive to /etc/apt/sources.list.d, or give the path of a kernel as kernel in section [vm].")
	}
	return sources, nil
}

// imageRE and modulesRE are what a meta package depends on: the image proper,
// and at Ubuntu the modules beside it.
var (
	imageRE   = regexp.MustCompile(`\blinux-image-(?:unsigned-)?[0-9][0-9A-Za-z.+~-]*`)
	modulesRE = regexp.MustCompile(`\blinux-modules-[0-9][0-9A-Za-z.+~-]*`)
)

// kernelPackages finds the image behind a meta package and, if it has one, its
// package of modules.
func kernelPackages(ctx context.Context, a *apt, meta string) ([]debPackage, error) {
	m, ok, err := a.show(ctx, meta)
	if err != nil {
		return nil, err
	}
	name := imageRE.FindString(m.depends)
	if !ok || name == "" {
		return nil, fault.New(fault.Missing, "the host's archive has no usable package %s", meta).
			WithNext("Check the host's package sources.")
	}
	image, ok, err := a.show(ctx, name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.New(fault.Missing, "the host's archive has no package %s, which %s wants", name, meta).
			WithNext("The archive is being updated: try again later.")
	}
	pkgs := []debPackage{image}
	if name := modulesRE.FindString(image.depends); name != "" {
		mods, ok, err := a.show(ctx, name)
		if err != nil {
			return nil, err
		}
		if ok {
			pkgs = append(pkgs, mods)
		}
	}
	return pkgs, nil
}

func (s *Store) fetchPackages(ctx context.Context, a *apt, family, source string, pkgs []debPackage, p domain.ProgressFunc) (domain.Kernel, error) {
	tmp, err := os.MkdirTemp(s.path("tmp"), "fetch-*")
	if err != nil {
		return domain.Kernel{}, noSpace(err)
	}
	defer os.RemoveAll(tmp)
	for _, pkg := range pkgs {
		deb, err := a.download(ctx, pkg, p)
		if err != nil {
			return domain.Kernel{}, err
		}
		p.Report(domain.Progress{Stage: "unpack " + pkg.name})
		if err := s.host.run(ctx, cmdrun.Command{Argv: []string{"dpkg-deb", "-x", deb, tmp}}); err != nil {
			return domain.Kernel{}, unpackFault(ctx, pkg.name, err)
		}
	}
	p.Report(domain.Progress{Stage: "publish kernel"})
	return s.publishTree(ctx, tmp, family, source)
}

// publishTree publishes the kernel in an unpacked package.
func (s *Store) publishTree(ctx context.Context, tree, family, source string) (domain.Kernel, error) {
	images, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil {
		return domain.Kernel{}, err
	}
	if len(images) != 1 {
		return domain.Kernel{}, fmt.Errorf("package %s: %d kernels in /boot, want 1", source, len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	vmlinux, err := readKernel(images[0])
	if err != nil {
		return domain.Kernel{}, err
	}
	dir := ""
	for _, d := range []string{"lib/modules", "usr/lib/modules"} {
		if st, err := os.Stat(filepath.Join(tree, d, release)); err == nil && st.IsDir() {
			dir = filepath.Join(tree, d, release)
		}
	}
	if dir == "" {
		return domain.Kernel{}, fmt.Errorf("package %s: no modules of %s", source, release)
	}
	mods, err := neededModules(dir)
	if err != nil {
		return domain.Kernel{}, fmt.Errorf("package %s: %w", source, err)
	}
	// A newer one takes the default over from the one before, but not from a
	// kernel of another kind, which somebody has chosen.
	_, def, err := s.Kernels(ctx)
	if err != nil {
		return domain.Kernel{}, err
	}
	return s.publish(ctx, newKernel{
		name: family + "-" + release, source: source, vmlinux: vmlinux, modules: mods,
		makeDefault: strings.HasPrefix(def, family+"-"),
	})
}

// neededModules picks the modules of a machine from a kernel's directory.
func neededModules(dir string) ([]loadable, error) {
	t, err := openModuleTree(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	required := map[string]bool{}
	for _, w := range wantedModules {
		names = append(names, w.name)
		required[w.name] = w.required
	}
	mods, missing, err := t.order(names)
	if err != nil {
		return nil, err
	}
	for _, name := range missing {
		if required[name] {
			return nil, fault.New(fault.Unsupported, "the kernel has no %s, which a machine cannot do without", name).
				WithNext("Use another kernel: `agentiso kernel build` makes one that has everything.")
		}
	}
	return mods, nil
}

// newestFetched is the last fetched kernel of a distribution.
func (s *Store) newestFetched(ctx context.Context, family string) (domain.Kernel, bool) {
	list, _, err := s.Kernels(ctx)
	if err != nil {
		return domain.Kernel{}, false
	}
	var best domain.Kernel
	for _, k := range list {
		if strings.HasPrefix(k.Name, family+"-") && strings.HasPrefix(k.Source, "linux-image-") && k.CreatedAt.After(best.CreatedAt) {
			best = k
		}
	}
	return best, best.Name != ""
}

// bySource finds a kernel by what it was made from.
func (s *Store) bySource(ctx context.Context, source string) (domain.Kernel, bool) {
	list, _, err := s.Kernels(ctx)
	if err != nil {
		return domain.Kernel{}, false
	}
	for _, k := range list {
		if k.Source == source {
			return k, true
		}
	}
	return domain.Kernel{}, false
}

// tool is a program with the package that has it.
type tool struct{ program, pkg string }

// missingPrograms names the packages of the programs that the host lacks, each
// once.
func (s *Store) missingPrograms(tools []tool) []string {
	var pkgs []string
	seen := map[string]bool{}
	for _, t := range tools {
		if s.host.look(t.program) != nil && !seen[t.pkg] {
			seen[t.pkg] = true
			pkgs = append(pkgs, t.pkg)
		}
	}
	return pkgs
}

func unpackFault(ctx context.Context, name string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("unpack %s: %w", name, ctx.Err())
	}
	var e *cmdrun.Error
	if errors.As(err, &e) && strings.Contains(e.Stderr, "No space left") {
		return fault.New(fault.NoSpace, "unpack %s: the disk is full: %w", name, err).
			WithNext("Free some space where the data directory is.")
	}
	return fmt.Errorf("unpack %s: %w", name, err)
}
