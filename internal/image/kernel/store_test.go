package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	release61   = "6.1.0-56-cloud-amd64"
	imagePkg    = "linux-image-" + release61
	imageSource = imagePkg + " 6.1.192-2"
)

// kernelTree is what Debian's package unpacks to.
func kernelTree(t *testing.T, vmlinux []byte) func(dir string) {
	return func(dir string) {
		put(t, filepath.Join(dir, "boot/vmlinuz-"+release61), string(bzImage(t, "lz4", vmlinux)))
		if err := os.CopyFS(filepath.Join(dir, "lib/modules", release61), os.DirFS(modulesDir(t))); err != nil {
			t.Error(err)
		}
	}
}

func withCloudKernel(t *testing.T, fh *fakeHost, vmlinux []byte) {
	fh.pkg("linux-image-cloud-amd64", "6.1.192-2", imagePkg+" (= 6.1.192-2)", nil)
	fh.pkg(imagePkg, "6.1.192-2", "kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool", kernelTree(t, vmlinux))
}

func wantFault(t *testing.T, err error, kind fault.Kind, text string) {
	t.Helper()
	if !fault.Is(err, kind) || !strings.Contains(err.Error(), text) {
		t.Fatalf("got %v (%s), want a %s with %q", err, fault.As(err).Kind, kind, text)
	}
	if fault.As(err).Next == "" {
		t.Errorf("%v: no next step", err)
	}
}

func TestFetchAndBoot(t *testing.T) {
	s, fh := newStore(t)
	_, err := s.Boot(t.Context(), "")
	wantFault(t, err, fault.Missing, "no guest kernel")

	withCloudKernel(t, fh, pvhVmlinux(banner))
	var stages []string
	k, err := s.Fetch(t.Context(), false, func(p domain.Progress) {
		if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
			stages = append(stages, p.Stage)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != "debian-"+release61 || k.Release != release61 || k.Source != imageSource || !k.PVH || !k.NeedsACPI || k.Digest != digest(pvhVmlinux(banner)) {
		t.Errorf("%+v", k)
	}
	if diff := cmp.Diff([]string{"fetch package lists", "download " + imagePkg, "unpack " + imagePkg, "publish kernel"}, stages); diff != "" {
		t.Error(diff)
	}
	b, err := s.Boot(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if b.Kernel.Name != k.Name || b.Append != CommandLine(k) {
		t.Errorf("%+v", b)
	}
	text, err := os.ReadFile(b.Initrd)
	if err != nil || !strings.Contains(string(text), "virtio_ring.ko\nvirtio.ko\nvirtio_mmio.ko\n") {
		t.Errorf("initrd of %d bytes, %v", len(text), err)
	}
	list, def, err := s.Kernels(t.Context())
	if err != nil || len(list) != 1 || def != k.Name {
		t.Errorf("%v, %q, %v", list, def, err)
	}
	// Nothing but the store itself is left, and a second fetch runs nothing.
	for _, f := range tree(t, s.opt.Dir) {
		if strings.HasPrefix(f, "tmp/") || strings.HasSuffix(f, ".deb") {
			t.Errorf("left behind: %s", f)
		}
	}
	ran := len(fh.ran)
	if again, err := s.Fetch(t.Context(), false, nil); err != nil || again != k || len(fh.ran) != ran {
		t.Errorf("%+v, %v, ran %v", again, err, fh.ran[ran:])
	}
	if again, err := s.Fetch(t.Context(), true, nil); err != nil || again != k || slices.Contains(fh.ran[ran:], "apt-get "+imagePkg+"=6.1.192-2") {
		t.Errorf("forced: %+v, %v, ran %v", again, err, fh.ran[ran:])
	}
}

func TestNewerKernelTakesTheDefaultFromItsKind(t *testing.T) {
	s, fh := newStore(t)
	withCloudKernel(t, fh, pvhVmlinux(banner))
	if _, err := s.Fetch(t.Context(), false, nil); err != nil {
		t.Fatal(err)
	}
	newer := func(version string) string {
		t.Helper()
		release := "6.1.0-" + version + "-cloud-amd64"
		pkg := "linux-image-" + release
		fh.pkg("linux-image-cloud-amd64", "6.1."+version, pkg, nil)
		fh.pkg(pkg, "6.1."+version, "", func(dir string) {
			put(t, filepath.Join(dir, "boot/vmlinuz-"+release), string(bzImage(t, "lz4", pvhVmlinux(banner+version))))
			if err := os.CopyFS(filepath.Join(dir, "usr/lib/modules", release), os.DirFS(modulesDir(t))); err != nil {
				t.Error(err)
			}
		})
		k, err := s.Fetch(t.Context(), true, nil)
		if err != nil {
			t.Fatal(err)
		}
		return k.Name
	}
	name := newer("57")
	if _, def, _ := s.Kernels(t.Context()); def != name {
		t.Errorf("default %q, want %q", def, name)
	}
	leanHost(t, fh, false)
	if _, err := s.BuildLean(t.Context(), 0, false, nil); err != nil {
		t.Fatal(err)
	}
	newer("58")
	if _, def, _ := s.Kernels(t.Context()); def != LeanName {
		t.Errorf("default %q, want %q", def, LeanName)
	}
	if k, err := s.Fetch(t.Context(), false, nil); err != nil || k.Name != "debian-6.1.0-58-cloud-amd64" {
		t.Errorf("newest: %+v, %v", k, err)
	}
}

func TestFetchUbuntu(t *testing.T) {
	s, fh := newStore(t)
	put(t, filepath.Join(s.host.root, "etc/os-release"), "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n")
	put(t, filepath.Join(s.host.root, "etc/apt/sources.list.d/ubuntu.sources"),
		"Types: deb\nURIs: http://mirror.example/ubuntu\nSuites: noble noble-updates\nComponents: main universe\nSigned-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg\n")
	fh.pkg("linux-image-virtual", "6.8.0.50.50", "linux-image-6.8.0-50-generic, linux-base", nil)
	fh.pkg("linux-image-6.8.0-50-generic", "6.8.0-50.51", "kmod, linux-modules-6.8.0-50-generic", func(dir string) {
		put(t, filepath.Join(dir, "boot/vmlinuz-6.8.0-50-generic"), string(bzImage(t, "zstd", pvhVmlinux("Linux version 6.8.0-50-generic (x"))))
	})
	fh.pkg("linux-modules-6.8.0-50-generic", "6.8.0-50.51", "", func(dir string) {
		if err := os.CopyFS(filepath.Join(dir, "lib/modules/6.8.0-50-generic"), os.DirFS(modulesDir(t))); err != nil {
			t.Error(err)
		}
	})
	k, err := s.Fetch(t.Context(), false, nil)
	if err != nil || k.Name != "ubuntu-6.8.0-50-generic" {
		t.Fatalf("%+v, %v", k, err)
	}
}

func TestFetchFaults(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, s *Store, fh *fakeHost)
		kind fault.Kind
		want string
	}{
		{"no PVH", func(t *testing.T, _ *Store, fh *fakeHost) { withCloudKernel(t, fh, fakeVmlinux(nil, banner)) }, fault.Unsupported, "no PVH entry point"},
		{"no package", func(*testing.T, *Store, *fakeHost) {}, fault.Missing, "linux-image-cloud-amd64"},
		{"image gone", func(t *testing.T, _ *Store, fh *fakeHost) {
			fh.pkg("linux-image-cloud-amd64", "1", imagePkg, nil)
		}, fault.Missing, imagePkg},
		{"another distribution", func(t *testing.T, s *Store, _ *fakeHost) {
			put(t, filepath.Join(s.host.root, "etc/os-release"), "ID=fedora\n")
		}, fault.Unsupported, "fedora"},
		{"no archive", func(t *testing.T, s *Store, _ *fakeHost) {
			put(t, filepath.Join(s.host.root, "etc/apt/sources.list.d/debian.sources"), "")
		}, fault.Missing, "package sources name no archive"},
		{"no programs", func(_ *testing.T, _ *Store, fh *fakeHost) { fh.absent["apt-get"], fh.absent["apt-cache"] = true, true }, fault.Missing, "belong to: apt"},
		{"mirror down", func(_ *testing.T, _ *Store, fh *fakeHost) {
			fh.programs["apt-get"] = func(context.Context, cmdrun.Command) error {
				return &cmdrun.Error{Argv: []string{"apt-get"}, Stderr: "E: Could not resolve", Err: errors.New("exit status 100")}
			}
		}, fault.Unavailable, "Could not resolve"},
		{"disk full", func(t *testing.T, _ *Store, fh *fakeHost) {
			withCloudKernel(t, fh, pvhVmlinux(banner))
			fh.programs["dpkg-deb"] = func(context.Context, cmdrun.Command) error {
				return &cmdrun.Error{Argv: []string{"dpkg-deb"}, Stderr: "No space left on device", Err: errors.New("exit status 2")}
			}
		}, fault.NoSpace, "disk is full"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, fh := newStore(t)
			tt.make(t, s, fh)
			_, err := s.Fetch(t.Context(), false, nil)
			wantFault(t, err, tt.kind, tt.want)
			if list, def, err := s.Kernels(t.Context()); err != nil || len(list) != 0 || def != "" {
				t.Errorf("left %v, %q, %v", list, def, err)
			}
			for _, f := range tree(t, s.opt.Dir) {
				if !strings.HasPrefix(f, "apt/") {
					t.Errorf("left behind: %s", f)
				}
			}
		})
	}
}

// leanHost can build: every program of the build does something.
func leanHost(t *testing.T, fh *fakeHost, lost bool) {
	fh.pkg(leanPackage, "6.12.117-1", "binutils, xz-utils", func(dir string) {
		put(t, filepath.Join(dir, "usr/src", leanPackage+".tar.xz"), "source")
	})
	nice := func(ctx context.Context, c cmdrun.Command) error {
		argv := c.Argv[3:]
		switch {
		case argv[0] == "make" && argv[1] == "olddefconfig":
			config := guestConfig
			if lost {
				config = strings.ReplaceAll(config, "CONFIG_PVH=y", "# CONFIG_PVH is not set")
			}
			return os.WriteFile(filepath.Join(c.Dir, ".config"), []byte(config), 0o644)
		case argv[0] == "make" && argv[len(argv)-1] == "vmlinux":
			fmt.Fprint(c.Stdout, "  CC      a.o\n  AS      b.o\nnoise\n  LD      vmlinux\n")
		case argv[0] == "strip":
			return os.WriteFile(filepath.Join(c.Dir, argv[2]), pvhVmlinux("Linux version 6.12.117-agentiso (x"+mmioMarker), 0o644)
		}
		return nil
	}
	fh.programs["make"], fh.programs["strip"] = nice, nice
}

func TestBuildLean(t *testing.T) {
	s, fh := newStore(t)
	withCloudKernel(t, fh, pvhVmlinux(banner))
	if _, err := s.Fetch(t.Context(), false, nil); err != nil {
		t.Fatal(err)
	}
	leanHost(t, fh, false)
	var compiled domain.Progress
	k, err := s.BuildLean(t.Context(), 2, false, func(p domain.Progress) {
		if p.Total == leanSteps {
			compiled = p
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != LeanName || k.NeedsACPI || k.Source != leanPackage+" 6.12.117-1" || k.Release != "6.12.117-agentiso" {
		t.Errorf("%+v", k)
	}
	if compiled.Done != 3 {
		t.Errorf("counted %d objects, want 3", compiled.Done)
	}
	if _, def, _ := s.Kernels(t.Context()); def != LeanName {
		t.Errorf("the default is %q", def)
	}
	sources, err := os.ReadFile(s.path("apt/lean/private.sources"))
	if err != nil || !strings.Contains(string(sources), "URIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n") {
		t.Errorf("sources %s, %v", sources, err)
	}
	// The same configuration is not built again, but becomes the default again.
	if err := s.SetDefault("debian-" + release61); err != nil {
		t.Fatal(err)
	}
	ran := len(fh.ran)
	if again, err := s.BuildLean(t.Context(), 0, false, nil); err != nil || again != k || len(fh.ran) != ran {
		t.Errorf("%+v, %v, ran %v", again, err, fh.ran[ran:])
	}
	if _, def, _ := s.Kernels(t.Context()); def != LeanName {
		t.Errorf("the default is %q", def)
	}
	if _, err := s.BuildLean(t.Context(), 0, true, nil); err != nil || len(fh.ran) == ran {
		t.Errorf("forced: %v, ran %v", err, fh.ran[ran:])
	}
	b, err := s.Boot(t.Context(), "")
	if err != nil || b.Kernel.Name != LeanName {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestBuildLeanNamesWhatIsMissing(t *testing.T) {
	s, fh := newStore(t)
	for _, p := range []string{"gcc", "ld", "strip", "flex", "bison", "bc"} {
		fh.absent[p] = true
	}
	if err := os.Remove(filepath.Join(s.host.root, "usr/include/gelf.h")); err != nil {
		t.Fatal(err)
	}
	_, err := s.BuildLean(t.Context(), 0, false, nil)
	wantFault(t, err, fault.Missing, "gcc binutils flex bison bc libelf-dev")
	if next := fault.As(err).Next; next != "Run `sudo apt-get install gcc binutils flex bison bc libelf-dev`." {
		t.Errorf("next: %s", next)
	}
}

// TestBuildLeanLeavesNothing fails and cancels a build at each of its commands.
func TestBuildLeanLeavesNothing(t *testing.T) {
	count := func() int {
		s, fh := newStore(t)
		leanHost(t, fh, false)
		if _, err := s.BuildLean(t.Context(), 0, false, nil); err != nil {
			t.Fatal(err)
		}
		return len(fh.ran)
	}()
	for step := range count {
		for _, how := range []string{"fail", "cancel"} {
			s, fh := newStore(t)
			leanHost(t, fh, false)
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			s.host.run = func(ctx context.Context, c cmdrun.Command) error {
				n++
				if n-1 != step {
					return fh.run(ctx, c)
				}
				// The effect happens even though the command then fails.
				err := fh.run(ctx, c)
				if how == "cancel" {
					cancel()
					err = ctx.Err()
				}
				return &cmdrun.Error{Argv: c.Argv, Stderr: "injected", Err: errors.Join(err, errors.New("exit status 1"))}
			}
			_, err := s.BuildLean(ctx, 0, false, nil)
			cancel()
			if err == nil || how == "cancel" && !errors.Is(err, context.Canceled) {
				t.Errorf("%s at %d: %v", how, step, err)
			}
			for _, f := range tree(t, s.opt.Dir) {
				if !strings.HasPrefix(f, "apt/lean/") {
					t.Errorf("%s at %d left %s", how, step, f)
				}
			}
		}
	}
}

func TestBuildLeanRefusesASourceWithoutEssentials(t *testing.T) {
	s, fh := newStore(t)
	leanHost(t, fh, true)
	if _, err := s.BuildLean(t.Context(), 0, false, nil); err == nil || !strings.Contains(err.Error(), "CONFIG_PVH") {
		t.Errorf("got %v", err)
	}
}

func TestLeanSourceElsewhere(t *testing.T) {
	s, _ := newStore(t)
	_, err := s.leanSource(release{id: "ubuntu"})
	wantFault(t, err, fault.Missing, "no Debian archive")
	s.opt.Mirror, s.opt.Keyring = "http://m.example/debian", "/k.gpg"
	src, err := s.leanSource(release{id: "ubuntu"})
	if err != nil || src.uris[0] != s.opt.Mirror || src.suites[0] != leanRelease || src.signedBy != "/k.gpg" {
		t.Errorf("%+v, %v", src, err)
	}
}

func TestOneBuildAtATime(t *testing.T) {
	s, _ := newStore(t)
	if err := s.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Fetch(ctx, false, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	s.letGo()
}

func TestImportAndNames(t *testing.T) {
	s, _ := newStore(t)
	dir := t.TempDir()
	plain, packed := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "bzImage")
	put(t, plain, string(pvhVmlinux(banner+mmioMarker)))
	put(t, packed, string(bzImage(t, "xz", pvhVmlinux(banner))))
	a, err := s.Import(t.Context(), "a", plain, false)
	if err != nil || a.NeedsACPI {
		t.Fatalf("%+v, %v", a, err)
	}
	b, err := s.Import(t.Context(), "b", packed, true)
	if err != nil || !b.NeedsACPI {
		t.Fatalf("%+v, %v", b, err)
	}
	list, def, err := s.Kernels(t.Context())
	if diff := cmp.Diff([]domain.Kernel{a, b}, list); diff != "" || def != "b" || err != nil {
		t.Errorf("%s %q %v", diff, def, err)
	}
	// Content that is known already is not kept twice.
	if _, err := s.Import(t.Context(), "c", plain, false); err != nil {
		t.Fatal(err)
	}
	if ents, _ := os.ReadDir(s.path("kernels")); len(ents) != 2 {
		t.Errorf("%d kernels on disk, want 2", len(ents))
	}
	for _, name := range []string{"", "..", "../x", "a/b", "Ü", "-a", strings.Repeat("x", 200)} {
		_, err := s.Import(t.Context(), name, plain, false)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("name %q: %v", name, err)
		}
		if name != "" {
			_, err := s.Boot(t.Context(), name)
			wantFault(t, err, fault.NotFound, "no kernel is called")
		}
	}
	put(t, plain, "text")
	_, err = s.Import(t.Context(), "d", plain, false)
	wantFault(t, err, fault.Invalid, "not an x86-64 ELF kernel")
	_, err = s.Import(t.Context(), "d", filepath.Join(dir, "absent"), false)
	wantFault(t, err, fault.Missing, "absent")
	wantFault(t, s.SetDefault("d"), fault.NotFound, `"d"`)
}

func TestReplacedKernelGoesInTime(t *testing.T) {
	s, _ := newStore(t)
	path := filepath.Join(t.TempDir(), "vmlinux")
	var old domain.Kernel
	for i := range 3 {
		put(t, path, string(pvhVmlinux(banner+fmt.Sprint(i))))
		k, err := s.Import(t.Context(), "x", path, false)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 0:
			old = k
		case 1:
			// Somebody may just be booting the one before.
			if _, err := os.Stat(old.Path); err != nil {
				t.Errorf("gone at once: %v", err)
			}
			past := time.Now().Add(-2 * pruneAge)
			if err := os.Chtimes(filepath.Dir(old.Path), past, past); err != nil {
				t.Fatal(err)
			}
		case 2:
			if _, err := os.Stat(old.Path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("never goes: %v", err)
			}
		}
	}
}

func TestDamagedStore(t *testing.T) {
	s, _ := newStore(t)
	path := filepath.Join(t.TempDir(), "vmlinux")
	put(t, path, string(pvhVmlinux(banner)))
	if _, err := s.Import(t.Context(), "good", path, true); err != nil {
		t.Fatal(err)
	}
	put(t, s.path("names/bad"), "../../etc")
	put(t, s.path("names/empty"), strings.Repeat("0", 64)+"\n")
	list, def, err := s.Kernels(t.Context())
	if err != nil || len(list) != 1 || def != "good" {
		t.Errorf("%v, %q, %v", list, def, err)
	}
	if _, err := s.Boot(t.Context(), "bad"); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("got %v", err)
	}
	put(t, s.path("default"), "empty\n")
	_, err = s.Boot(t.Context(), "")
	wantFault(t, err, fault.Missing, "no guest kernel")
}

func TestOpenClearsWorkInProgress(t *testing.T) {
	s, _ := newStore(t)
	put(t, s.path("tmp/lean-1/src/huge"), "x")
	if _, err := Open(s.opt); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, s.path("tmp")); len(got) != 0 {
		t.Errorf("left %v", got)
	}
}

func TestOverrides(t *testing.T) {
	s, _ := newStore(t)
	dir := t.TempDir()
	s.opt.KernelPath, s.opt.InitrdPath = filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")
	_, err := s.Boot(t.Context(), "")
	wantFault(t, err, fault.Missing, s.opt.KernelPath)

	vmlinux := pvhVmlinux(banner)
	put(t, s.opt.KernelPath, string(bzImage(t, "gzip", vmlinux)))
	_, err = s.Boot(t.Context(), "")
	wantFault(t, err, fault.Missing, s.opt.InitrdPath)

	put(t, s.opt.InitrdPath, "initrd")
	b, err := s.Boot(t.Context(), "")
	if err != nil || b.Initrd != s.opt.InitrdPath || !b.Kernel.PVH || b.Kernel.Digest != digest(vmlinux) {
		t.Fatalf("%+v, %v", b, err)
	}
	if got, err := os.ReadFile(b.Kernel.Path); err != nil || string(got) != string(vmlinux) {
		t.Errorf("unpacked to %d bytes, %v", len(got), err)
	}
	again, err := s.Boot(t.Context(), "")
	if err != nil || again != b {
		t.Errorf("%+v, %v", again, err)
	}

	// Without a PVH entry the file is left to QEMU as it is.
	put(t, s.opt.KernelPath, string(bzImage(t, "gzip", fakeVmlinux(nil, banner+"x"))))
	b, err = s.Boot(t.Context(), "")
	if err != nil || b.Kernel.Path != s.opt.KernelPath || b.Kernel.PVH {
		t.Errorf("%+v, %v", b, err)
	}
	put(t, s.opt.KernelPath, "neither")
	_, err = s.Boot(t.Context(), "")
	wantFault(t, err, fault.Invalid, "not an x86-64 ELF kernel")

	// A kernel asked for by name comes before the override.
	_, err = s.Boot(t.Context(), "lean")
	wantFault(t, err, fault.NotFound, `"lean"`)

	s.opt.KernelPath, s.opt.InitrdPath = "", ""
	s.opt.AgentPath = filepath.Join(dir, "no agent")
	put(t, filepath.Join(dir, "v"), string(vmlinux))
	if _, err := s.Import(t.Context(), "k", filepath.Join(dir, "v"), true); err != nil {
		t.Fatal(err)
	}
	_, err = s.Boot(t.Context(), "")
	wantFault(t, err, fault.Missing, "guest agent")
}
