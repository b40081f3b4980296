package server

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/workspace"
)

// Lives changes workspaces.
type Lives interface {
	Create(ctx context.Context, o workspace.CreateOptions) (*domain.Workspace, workspace.Timings, error)
	Start(ctx context.Context, ref string) (*domain.Workspace, workspace.Timings, error)
	Stop(ctx context.Context, ref string, force bool) (*domain.Workspace, error)
	Destroy(ctx context.Context, ref string) (id string, err error)
	Rename(ctx context.Context, ref, name string) (*domain.Workspace, error)
}

// Views looks at workspaces.
type Views interface {
	Get(ctx context.Context, ref string) (*domain.Workspace, error)
	List(ctx context.Context) ([]*domain.Workspace, error)
	UsersOf(imageDigest string) []string
	DiskUsedBytes(ctx context.Context, ref string) (int64, error)
}

// Insides reaches what runs in workspaces.
type Insides interface {
	Logs(ctx context.Context, ref string, follow bool, tailBytes int64, fn func([]byte) error) error
	Stats(ctx context.Context, ref string) (workspace.Stats, error)
	// Agent returns the way to the agent of a running workspace. Requests over
	// it end with an error within two seconds of the machine's end.
	Agent(ctx context.Context, ref string) (http.RoundTripper, *domain.Workspace, error)
}

// Workspaces is all that this package asks of package workspace.
type Workspaces interface {
	Lives
	Views
	Insides
}

// Images keeps root disks.
type Images interface {
	ImageViews
	Build(ctx context.Context, recipe, name string, force bool, p domain.ProgressFunc) (domain.Image, error)
	Pull(ctx context.Context, o domain.PullOptions, p domain.ProgressFunc) (domain.Image, error)
	// Import makes an image of a tar stream, plain or compressed.
	Import(ctx context.Context, name string, tar io.Reader, p domain.ProgressFunc) (domain.Image, error)
	Remove(ctx context.Context, ref string, inUse func(digest string) []string) (digest string, diskRemoved bool, err error)
}

// ImageViews looks at root disks; the ref "" is the default image.
type ImageViews interface {
	Image(ctx context.Context, ref string) (domain.Image, error)
	Images(ctx context.Context) ([]domain.Image, error)
}

// Kernels keeps guest kernels.
type Kernels interface {
	Fetch(ctx context.Context, force bool, p domain.ProgressFunc) (domain.Kernel, error)
	BuildLean(ctx context.Context, jobs int, force bool, p domain.ProgressFunc) (domain.Kernel, error)
	Kernels(ctx context.Context) (list []domain.Kernel, defaultName string, err error)
}

// System is the daemon itself.
type System interface {
	Info(ctx context.Context) (Info, error)
	Doctor(ctx context.Context, probe bool) ([]Check, error)
	// Shutdown asks the daemon to end; it only leaves word and returns at once.
	Shutdown(stopMachines bool)
}

// Info says what daemon this is. The counts of workspaces are added here.
type Info struct {
	Version       string
	PID           int
	StartedAt     time.Time
	DataDir       string
	RunDir        string
	ConfigFile    string // "" without one
	StorageDriver string
	NetworkDriver string
	QEMUVersion   string
	Accelerator   string // "kvm", "tcg", or what is known so far
	DefaultImage  string
	DefaultKernel string
	MaxWorkspaces int
}

// Verdict is what a check of the host came to.
type Verdict string

// The verdicts.
const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // it works, but less well
	Fail Verdict = "fail" // something will not work
)

// Check is one thing about the host that was looked at.
type Check struct {
	Name    string
	Verdict Verdict
	Detail  string // what was found
	Next    string // what to do about it; "" when nothing
}
