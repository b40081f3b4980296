package servertest

import (
	"context"
	"io"
	"os"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/server"
)

// Images is a store of images in memory; an image's digest is its name.
type Images struct {
	// Gate, when set, is received from before a Build or Pull goes on.
	Gate chan struct{}
	// PullAuth is what the last Pull was given.
	PullAuth domain.RegistryAuth

	mu  sync.Mutex
	all map[string]domain.Image
}

func newImages() *Images {
	s := &Images{all: map[string]domain.Image{}}
	s.add("dev", "build:dev")
	return s
}

func (s *Images) add(name, source string) domain.Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := domain.Image{Digest: "sha256:" + name, Names: []string{name}, CreatedAt: time.Now(), SizeBytes: 512 << 20, UsedBytes: 200 << 20, Source: source}
	s.all[name] = i
	return i
}

// Set replaces an image, to give it an entrypoint or a user.
func (s *Images) Set(name string, change func(*domain.Image)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.all[name]
	change(&i)
	s.all[name] = i
}

func (s *Images) work(ctx context.Context, p domain.ProgressFunc) error {
	p.Report(domain.Progress{Stage: "download", Done: 1 << 20, Total: 4 << 20, Unit: "bytes"})
	p.Report(domain.Progress{Stage: "unpack", Log: "unpacking"})
	if s.Gate == nil {
		return nil
	}
	select {
	case <-s.Gate:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Build makes an image of any recipe but "broken".
func (s *Images) Build(ctx context.Context, recipe, name string, _ bool, p domain.ProgressFunc) (domain.Image, error) {
	if err := s.work(ctx, p); err != nil {
		return domain.Image{}, err
	}
	if recipe == "broken" {
		return domain.Image{}, fault.New(fault.Invalid, "no recipe is called %q", recipe).WithNext("Recipes: minimal, dev, dev-full.")
	}
	if name == "" {
		name = recipe
	}
	return s.add(name, "build:"+recipe), nil
}

// Pull makes an image of any reference.
func (s *Images) Pull(ctx context.Context, o domain.PullOptions, p domain.ProgressFunc) (domain.Image, error) {
	s.mu.Lock()
	s.PullAuth = o.Auth
	s.mu.Unlock()
	if err := s.work(ctx, p); err != nil {
		return domain.Image{}, err
	}
	name := o.Name
	if name == "" {
		name = o.Reference
	}
	return s.add(name, "oci:"+o.Reference), nil
}

// Import reads all of the tar and keeps its length as the image's size.
func (s *Images) Import(_ context.Context, name string, tar io.Reader, _ domain.ProgressFunc) (domain.Image, error) {
	n, err := io.Copy(io.Discard, tar)
	if err != nil {
		return domain.Image{}, err
	}
	s.add(name, "import")
	s.Set(name, func(i *domain.Image) { i.SizeBytes = n })
	return s.Image(context.Background(), name)
}

// Image finds an image; "" is dev.
func (s *Images) Image(_ context.Context, ref string) (domain.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ref == "" {
		ref = "dev"
	}
	for name, i := range s.all {
		if name == ref || i.Digest == ref {
			return i, nil
		}
	}
	return domain.Image{}, fault.New(fault.NotFound, "no image has the name or digest %q", ref).
		WithNext("See `agentiso image ls`, or build one with `agentiso image build`.")
}

// Images lists all.
func (s *Images) Images(context.Context) ([]domain.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []domain.Image
	for _, i := range s.all {
		all = append(all, i)
	}
	return all, nil
}

// Remove removes an image that nothing uses.
func (s *Images) Remove(ctx context.Context, ref string, inUse func(string) []string) (string, bool, error) {
	i, err := s.Image(ctx, ref)
	if err != nil {
		return "", false, err
	}
	if users := inUse(i.Names[0]); len(users) > 0 {
		return "", false, fault.New(fault.InUse, "image %s is used by workspace %s", i.Names[0], users[0]).
			WithNext("Destroy it first.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, i.Names[0])
	return i.Digest, true, nil
}

// Kernels has one kernel.
type Kernels struct{}

func (Kernels) kernel() domain.Kernel {
	return domain.Kernel{Name: "lean", Release: "6.12.0", Digest: "sha256:lean", Source: "linux-source-6.12", SizeBytes: 18 << 20, CreatedAt: time.Unix(1700000000, 0)}
}

// Fetch returns it.
func (k *Kernels) Fetch(_ context.Context, _ bool, p domain.ProgressFunc) (domain.Kernel, error) {
	p.Report(domain.Progress{Stage: "download"})
	return k.kernel(), nil
}

// BuildLean returns it.
func (k *Kernels) BuildLean(_ context.Context, _ int, _ bool, p domain.ProgressFunc) (domain.Kernel, error) {
	p.Report(domain.Progress{Stage: "compile", Done: 1, Total: 2})
	return k.kernel(), nil
}

// Kernels lists it.
func (k *Kernels) Kernels(context.Context) ([]domain.Kernel, string, error) {
	return []domain.Kernel{k.kernel()}, "lean", nil
}

// System is the daemon.
type System struct {
	// ShutdownAsked receives stopMachines of each Shutdown.
	ShutdownAsked chan bool
	// Panic makes Doctor panic.
	Panic bool
}

// Info describes it.
func (*System) Info(context.Context) (server.Info, error) {
	return server.Info{
		Version: "test", PID: os.Getpid(), StartedAt: time.Now(), DataDir: "/var/lib/agentiso", RunDir: "/run/agentiso",
		StorageDriver: "qcow2", NetworkDriver: "user", QEMUVersion: "7.2.0", Accelerator: "tcg", DefaultImage: "dev", DefaultKernel: "lean", MaxWorkspaces: 10,
	}, nil
}

// Doctor reports one check of each verdict.
func (s *System) Doctor(context.Context, bool) ([]server.Check, error) {
	if s.Panic {
		panic("the doctor is ill")
	}
	return []server.Check{
		{Name: "qemu", Verdict: server.OK, Detail: "QEMU 7.2.0"},
		{Name: "kvm", Verdict: server.Warn, Detail: "no /dev/kvm", Next: "Enable virtualization."},
		{Name: "disk", Verdict: server.Fail, Detail: "1 MiB free", Next: "Free some space."},
	}, nil
}

// Shutdown leaves word.
func (s *System) Shutdown(stopMachines bool) { s.ShutdownAsked <- stopMachines }
