package kernel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// customKernel is Options.KernelPath as it was last found to be.
type customKernel struct {
	size   int64
	mtime  time.Time
	kernel domain.Kernel
}

// Import adds the kernel in the file path, a vmlinux or a bzImage, under name.
// It gets no modules: everything that the agent needs must be built in.
func (s *Store) Import(ctx context.Context, name, path string, makeDefault bool) (domain.Kernel, error) {
	image, err := readKernel(path)
	if err != nil {
		return domain.Kernel{}, err
	}
	return s.publish(ctx, newKernel{
		name: name, source: "import:" + filepath.Base(path), vmlinux: image, makeDefault: makeDefault,
	})
}

// readKernel reads a vmlinux, out of its bzImage if it is in one.
func readKernel(path string) ([]byte, error) {
	image, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.Missing, "read kernel: %w", err).WithNext("Give the path of a vmlinux or bzImage.")
	}
	vmlinux, err := extractVmlinux(image)
	if errors.Is(err, errNotBzImage) {
		return image, nil
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "kernel %s: %w", path, err).
			WithNext("Use an x86-64 vmlinux, or a bzImage packed with gzip, xz, zstd or lz4.")
	}
	return vmlinux, nil
}

// override is the kernel of Options.KernelPath. It is looked at again whenever
// the file has changed. A bzImage is left as it is when it has no PVH entry:
// QEMU can start it by other means, only slower.
func (s *Store) override() (domain.Kernel, error) {
	path := s.opt.KernelPath
	st, err := os.Stat(path)
	if err != nil {
		return domain.Kernel{}, fault.New(fault.Missing, "kernel %s of the configuration: %w", path, err).
			WithNext("Correct kernel in section [vm], or remove it to use the store's.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.custom; c.size == st.Size() && c.mtime.Equal(st.ModTime()) {
		if _, err := os.Stat(c.kernel.Path); err == nil {
			return c.kernel, nil
		}
	}
	image, err := os.ReadFile(path)
	if err != nil {
		return domain.Kernel{}, fault.New(fault.Missing, "kernel %s of the configuration: %w", path, err)
	}
	vmlinux, err := readKernel(path)
	if err != nil {
		return domain.Kernel{}, err
	}
	facts, err := inspectVmlinux(vmlinux)
	if err != nil {
		return domain.Kernel{}, fault.New(fault.Invalid, "kernel %s of the configuration: %w", path, err).
			WithNext("Correct kernel in section [vm]: an x86-64 vmlinux or bzImage.")
	}
	k := domain.Kernel{
		Name: "custom", Release: facts.Release, Digest: digest(image), Source: "file:" + path, Path: path,
		NeedsACPI: !facts.MMIOCmdline, PVH: facts.PVH, SizeBytes: st.Size(), CreatedAt: st.ModTime(),
	}
	if facts.PVH && len(vmlinux) != len(image) {
		// Out of its bzImage it starts seconds sooner.
		k.Digest, k.SizeBytes = digest(vmlinux), int64(len(vmlinux))
		k.Path = s.path("tmp", "custom-"+k.Digest[len("sha256:"):])
		if err := writeSynced(k.Path+".new", vmlinux); err != nil {
			return domain.Kernel{}, noSpace(err)
		}
		if err := os.Rename(k.Path+".new", k.Path); err != nil {
			return domain.Kernel{}, err
		}
	}
	s.custom = customKernel{st.Size(), st.ModTime(), k}
	return k, nil
}

// noSpace turns a full disk into the fault of that kind.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.New(fault.NoSpace, "the disk is full: %w", err).
			WithNext("Free some space where the data directory is.")
	}
	return err
}
