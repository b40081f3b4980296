package workspace

import (
	"context"
	"net/http"

	"github.com/agentiso/agentiso/internal/domain"
)

// Everything below is what this package needs of the rest. All methods may be
// called concurrently for different ids; calls for one id are made one at a
// time. "Remove" verbs say what should be, not what was: removing what is not
// there is not an error.

// Disks gives workspaces their disks.
type Disks interface {
	// Create makes a writable disk over base, at least as large as base.
	// A Create that failed may leave something; Remove clears it.
	Create(ctx context.Context, id string, base domain.Disk, sizeBytes int64) (domain.Disk, error)
	Remove(ctx context.Context, id string) error
	// Own hands the disk to the Unix user uid before its machine starts.
	Own(ctx context.Context, id string, uid int) error
	// UsedBytes is what the disk's own layer holds on the host.
	UsedBytes(ctx context.Context, id string) (int64, error)
	// List names the ids that have anything on the host, for sweeping.
	List(ctx context.Context) ([]string, error)
}

// Networks gives machines their places on a network.
type Networks interface {
	// Attach makes the slot of a machine that is about to start. A workspace
	// that has had a slot gets the same address and MAC again: prev.
	Attach(ctx context.Context, id string, policy domain.NetworkPolicy, prev domain.NetworkSlot) (domain.NetworkSlot, error)
	Detach(ctx context.Context, id string, slot domain.NetworkSlot) error
	// List names the ids that hold anything on the host, for sweeping.
	List(ctx context.Context) ([]string, error)
}

// Images resolves names to root disks and kernels.
type Images interface {
	// Image finds an image by name, digest or digest prefix; "" is the default.
	Image(ctx context.Context, ref string) (domain.Image, error)
	// Boot returns a kernel ("" is the default) with the initrd made for it.
	Boot(ctx context.Context, kernel string) (domain.Boot, error)
}

// Machines owns QEMU processes, one for an id at the most.
type Machines interface {
	// Start begins a machine and returns once its control socket answers; the
	// guest boots on. A Start that failed leaves no process and no run
	// directory. The process outlives this one.
	Start(ctx context.Context, spec domain.MachineSpec) (domain.Process, error)
	// Adopt takes back a machine that an earlier daemon started. It returns
	// [domain.ErrNoMachine] if that very process is gone.
	Adopt(ctx context.Context, id string, p domain.Process) error
	// Done is closed when the machine's process has ended, and at once when
	// there is none.
	Done(id string) <-chan struct{}
	// Exit says how the last machine of id ended.
	Exit(id string) domain.Exit
	// Kill ends the process, waits until it is gone and removes its run
	// directory.
	Kill(ctx context.Context, id string) error
	// List names the ids that have a run directory or a process, for sweeping.
	List(ctx context.Context) ([]string, error)
}

// Pauses knows which guests the host itself holds.
type Pauses interface {
	// Paused says why the guest of the live machine of id is held, "" if it is
	// not. It goes on by itself when the reason has gone.
	Paused(id string) string
}

// Consoles keeps what machines print.
type Consoles interface {
	// Tail returns at most the last n bytes of the console of id.
	Tail(id string, n int) []byte
	// Follow calls fn with what is kept and then with what comes, until ctx is
	// done or the machine's console has ended.
	Follow(ctx context.Context, id string, tailBytes int64, fn func([]byte) error) error
	// RemoveConsole deletes what is kept of id.
	RemoveConsole(id string) error
	// ListConsoles names the ids that have anything kept, for sweeping.
	ListConsoles(ctx context.Context) ([]string, error)
}

// Guests reaches the agents inside machines.
type Guests interface {
	// Open makes the link of id usable; it keeps it so, reconnecting as
	// needed, until Close. It returns at once: the first call over the link
	// waits for the agent, within its own context.
	Open(id string, ep domain.Endpoint) error
	// Transport carries HTTP to the agent of id. Every request over it ends
	// with an error within two seconds of Close or of the machine's end.
	Transport(id string) http.RoundTripper
	Close(id string)
}

// Records keeps workspace records; every write is durable when it returns.
type Records interface {
	// Insert adds a record if its id and name are free and fewer than limit
	// records exist; all in one transaction. It returns a fault of kind
	// name_taken or limit, or domain.ErrIDTaken.
	Insert(ctx context.Context, w *domain.Workspace, limit int) error
	// Update replaces the record with w's id. Absent is a not_found fault.
	Update(ctx context.Context, w *domain.Workspace) error
	Delete(ctx context.Context, id string) error
	List(ctx context.Context) ([]*domain.Workspace, error)
}
