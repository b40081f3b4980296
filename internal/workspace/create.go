package workspace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/undo"
)

// CreateOptions say what a new workspace shall be; zero values mean the
// configured defaults.
type CreateOptions struct {
	Name      string
	Image     string
	Kernel    string
	Init      string
	CPUs      int
	MemoryMiB int64
	DiskBytes int64
	Env       map[string]string
	Workdir   string
	User      string
	Policy    domain.NetworkPolicy
	Ephemeral bool
}

// undoLimit bounds cleanup after a failed operation: killing a machine and
// removing its disk take milliseconds, on a host that is out of disk or memory
// seconds.
const undoLimit = 30 * time.Second

// minMemoryMiB is what the kernel, the agent and a shell need to come up.
const minMemoryMiB = 128

// Create makes a workspace and returns once its guest has confirmed its
// identity. The caller bounds it with ctx; on any error, ctx's included,
// nothing of the workspace remains.
func (s *Service) Create(ctx context.Context, o CreateOptions) (_ *domain.Workspace, _ Timings, err error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, Timings{}, err
	}
	defer done()
	defer func() { err = cause(ctx, err) }()

	w, base, boot, err := s.plan(ctx, o)
	if err != nil {
		return nil, Timings{}, err
	}
	e, err := s.insert(ctx, w)
	if err != nil {
		return nil, Timings{}, err
	}
	defer func() { e.op <- struct{}{} }()
	c := s.clock("create", w.ID)

	var u undo.Stack
	defer u.Unwind(ctx, undoLimit, &err)
	u.Push("record", func(ctx context.Context) error { return s.forget(ctx, e) })

	// Each undo is recorded before its effect: a clone that timed out may
	// still have cloned.
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		u.Push("disk", func(ctx context.Context) error { return s.o.Disks.Remove(ctx, w.ID) })
		return c.step(gctx, "disk", func(ctx context.Context) (err error) {
			w.Disk, err = s.o.Disks.Create(ctx, w.ID, base.Disk, w.DiskBytes)
			if err != nil {
				return fmt.Errorf("make disk: %w", err)
			}
			w.DiskBytes = w.Disk.SizeBytes
			return s.o.Disks.Own(ctx, w.ID, w.UID)
		})
	})
	g.Go(func() error {
		u.Push("network", func(ctx context.Context) error { return s.o.Networks.Detach(ctx, w.ID, w.Slot) })
		return c.step(gctx, "network", func(ctx context.Context) (err error) {
			w.Slot, err = s.o.Networks.Attach(ctx, w.ID, w.Policy, domain.NetworkSlot{})
			if err != nil {
				return fmt.Errorf("attach network: %w", err)
			}
			return nil
		})
	})
	if err := g.Wait(); err != nil {
		return nil, Timings{}, fmt.Errorf("create workspace %s: %w", w.Name, err)
	}
	u.Push("console", func(context.Context) error { return s.o.Consoles.RemoveConsole(w.ID) })
	if err := s.bringUp(ctx, c, &u, w, boot); err != nil {
		return nil, Timings{}, fmt.Errorf("create workspace %s: %w", w.Name, err)
	}
	err = c.step(ctx, "record", func(ctx context.Context) error {
		w.State, w.StartedAt = domain.Running, time.Now()
		return s.save(ctx, e, w)
	})
	if err != nil {
		return nil, Timings{}, fmt.Errorf("create workspace %s: %w", w.Name, err)
	}
	u.Commit()
	s.watch(e, w.Machine)
	return clone(w), c.timings("cold"), nil
}

// cause replaces err by the reason why ctx was ended from above, if it was:
// "context canceled" tells a user nothing.
func cause(ctx context.Context, err error) error {
	if err == nil || !errors.Is(err, context.Canceled) {
		return err
	}
	if c := context.Cause(ctx); c != nil && !errors.Is(c, context.Canceled) {
		return c
	}
	return err
}

// plan checks o against the limits and resolves what it names. Nothing has
// been created when it fails.
func (s *Service) plan(ctx context.Context, o CreateOptions) (*domain.Workspace, domain.Image, domain.Boot, error) {
	fail := func(err error) (*domain.Workspace, domain.Image, domain.Boot, error) {
		return nil, domain.Image{}, domain.Boot{}, err
	}
	l := s.o.Limits
	w := &domain.Workspace{
		Name: o.Name, State: domain.Creating, CreatedAt: time.Now(),
		Init: or(o.Init, s.o.DefaultInit), CPUs: or(o.CPUs, l.DefaultCPUs),
		MemoryMiB: or(o.MemoryMiB, l.DefaultMemoryMiB), DiskBytes: or(o.DiskBytes, l.DefaultDiskBytes),
		Policy: o.Policy, Ephemeral: o.Ephemeral, MachineID: newMachineID(),
	}
	if w.Name != "" {
		if err := validName(w.Name); err != nil {
			return fail(err)
		}
	}
	if w.Init != "fast" && w.Init != "image" {
		return fail(fault.New(fault.Invalid, "init mode %q is not known", w.Init).WithNext("Use fast or image."))
	}
	if w.CPUs < 1 || w.CPUs > l.MaxCPUs {
		return fail(over("vCPUs", "resources.max_vcpus", int64(w.CPUs), 1, int64(l.MaxCPUs)))
	}
	if w.MemoryMiB < minMemoryMiB || w.MemoryMiB > l.MaxMemoryMiB {
		return fail(over("MiB of memory", "resources.max_memory_mb", w.MemoryMiB, minMemoryMiB, l.MaxMemoryMiB))
	}
	if w.DiskBytes < 1<<20 || w.DiskBytes > l.MaxDiskBytes {
		return fail(over("MiB of disk", "resources.max_disk_gb", w.DiskBytes>>20, 1, l.MaxDiskBytes>>20))
	}
	image, err := s.o.Images.Image(ctx, o.Image)
	if err != nil {
		return fail(err)
	}
	boot, err := s.o.Images.Boot(ctx, or(o.Kernel, s.o.DefaultKernel))
	if err != nil {
		return fail(err)
	}
	if image.SizeBytes > l.MaxDiskBytes {
		return fail(over("MiB of disk for this image", "resources.max_disk_gb", image.SizeBytes>>20, 1, l.MaxDiskBytes>>20))
	}
	w.DiskBytes = max(w.DiskBytes, image.SizeBytes)
	w.Image, w.ImageDigest, w.Kernel = o.Image, image.Digest, boot.Kernel.Name
	if w.Image == "" && len(image.Names) > 0 {
		w.Image = image.Names[0]
	}
	w.Env = map[string]string{}
	maps.Copy(w.Env, image.Env)
	maps.Copy(w.Env, o.Env)
	w.User, w.Workdir = or(o.User, image.User), or(o.Workdir, image.Workdir)
	return w, image, boot, nil
}

func over(what, key string, have, least, most int64) error {
	f := fault.New(fault.Limit, "%d %s is outside %d to %d", have, what, least, most)
	f.Next = "Ask for a value in that range."
	if have > most {
		f.Next = fmt.Sprintf("Ask for a value in that range, or raise %s in the configuration.", key)
	}
	return f
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// insert gives w an id and what must be unique beside it, reserves it in
// memory and writes the record. The returned entry's operation lock is held by
// the caller.
func (s *Service) insert(ctx context.Context, w *domain.Workspace) (*entry, error) {
	named := w.Name != ""
	for {
		e, err := s.reserve(w, named)
		if err != nil {
			return nil, err
		}
		err = s.o.Records.Insert(ctx, w, s.o.Limits.MaxWorkspaces)
		if err == nil {
			return e, nil
		}
		s.drop(e)
		e.op <- struct{}{}
		if !errors.Is(err, domain.ErrIDTaken) {
			return nil, fmt.Errorf("record workspace: %w", err)
		}
	}
}

func (s *Service) reserve(w *domain.Workspace, named bool) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.o.Limits.MaxWorkspaces; len(s.entries) >= n {
		return nil, fault.New(fault.Limit, "%d workspaces exist, which is the limit", n).
			WithNext("Destroy one (`agentiso ls` shows them), or raise resources.max_workspaces in the configuration.")
	}
	uids, cids := map[int]bool{}, map[uint32]bool{}
	for _, e := range s.entries {
		if named && (e.rec.Name == w.Name || e.rec.ID == w.Name) {
			return nil, fault.New(fault.NameTaken, "a workspace named %s exists already", w.Name).
				WithNext("Choose another name, or destroy that one with `agentiso destroy %s`.", w.Name)
		}
		uids[e.rec.UID], cids[e.rec.CID] = true, true
	}
	w.ID = newID()
	for s.entries[w.ID] != nil {
		w.ID = newID()
	}
	if !named {
		w.Name = "ws-" + w.ID
	}
	w.Hostname = "ws-" + w.ID
	w.UID = 0
	if s.o.UIDCount > 0 {
		w.UID = s.o.UIDBase
		for uids[w.UID] {
			w.UID++
		}
		if w.UID >= s.o.UIDBase+s.o.UIDCount {
			return nil, fault.New(fault.Limit, "all %d Unix users for machines are in use", s.o.UIDCount).
				WithNext("Raise vm.uid_count in the configuration.")
		}
	}
	if s.o.Link == domain.LinkVsock {
		w.CID = firstCID
		for cids[w.CID] {
			w.CID++
		}
	}
	e := newEntry(clone(w))
	<-e.op
	s.entries[w.ID] = e
	return e, nil
}

// firstCID is where vsock context ids begin: 0 to 2 are reserved, and the
// design leaves the rest below 100 to others.
const firstCID = 100

func (s *Service) drop(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, e.rec.ID)
}

// forget deletes the record, on disk first.
func (s *Service) forget(ctx context.Context, e *entry) error {
	if err := s.o.Records.Delete(ctx, e.rec.ID); err != nil {
		return err
	}
	s.drop(e)
	return nil
}
