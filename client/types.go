package client

import (
	"encoding/json"
	"time"
)

// The JSON form of these types is what `agentiso --json` prints. Field names
// are stable; fields may be added.

// State is where a workspace is in its life.
type State string

// The states.
const (
	Creating   State = "creating"
	Running    State = "running"
	Stopping   State = "stopping"
	Stopped    State = "stopped"
	Starting   State = "starting"
	Failed     State = "failed" // see Workspace.Reason
	Destroying State = "destroying"
)

// Workspace is one workspace as the daemon knows it.
type Workspace struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	State  State  `json:"state"`
	Reason string `json:"reason,omitempty"` // why it failed or stopped by itself

	CreatedAt time.Time `json:"created_at,omitzero"`
	StartedAt time.Time `json:"started_at,omitzero"` // of the present machine

	Image         string            `json:"image"`
	ImageDigest   string            `json:"image_digest"`
	Kernel        string            `json:"kernel"`
	Init          string            `json:"init"` // "fast" or "image"
	CPUs          int               `json:"cpus"`
	MemoryMiB     int64             `json:"memory_mib"`
	DiskBytes     int64             `json:"disk_bytes"`
	DiskUsedBytes int64             `json:"disk_used_bytes"` // its own layer, on the host
	Env           map[string]string `json:"env,omitempty"`
	User          string            `json:"user,omitempty"`
	Workdir       string            `json:"workdir,omitempty"`
	AllowInternet bool              `json:"allow_internet"`
	Ephemeral     bool              `json:"ephemeral,omitempty"` // ends with the Hold that made it

	Hostname string `json:"hostname,omitempty"`
	Address  string `json:"address,omitempty"` // in CIDR form
	MAC      string `json:"mac,omitempty"`

	// The machine, while there is one.
	MachinePID  int    `json:"machine_pid,omitempty"`
	Accelerator string `json:"accelerator,omitempty"` // "kvm" or "tcg"
	Link        string `json:"link,omitempty"`        // "serial" or "vsock"
}

// Timings tell where the time of a create or a start went. Steps may overlap.
type Timings struct {
	Start string // "cold", "template" or "warm"
	Total time.Duration
	Steps []Step
}

// Step is one part of an operation.
type Step struct {
	Name     string
	Duration time.Duration
}

// MarshalJSON writes milliseconds.
func (t Timings) MarshalJSON() ([]byte, error) {
	steps := t.Steps
	if steps == nil {
		steps = []Step{}
	}
	return json.Marshal(struct {
		Start   string  `json:"start"`
		TotalMS float64 `json:"total_ms"`
		Steps   []Step  `json:"steps"`
	}{t.Start, milliseconds(t.Total), steps})
}

// MarshalJSON writes milliseconds.
func (s Step) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Name string  `json:"name"`
		MS   float64 `json:"ms"`
	}{s.Name, milliseconds(s.Duration)})
}

// milliseconds keeps microseconds and drops what is noise.
func milliseconds(d time.Duration) float64 {
	return float64(d.Microseconds()) / 1000
}

// Stats are what a guest and its machine use.
type Stats struct {
	Uptime           time.Duration
	Boot             time.Duration // kernel start to agent ready, by the guest's clock
	CPUUsedPercent   float64
	MemoryTotalBytes int64
	MemoryUsedBytes  int64
	DiskTotalBytes   int64
	DiskUsedBytes    int64
	Processes        int
	AgentRSSBytes    int64
	MachinePSSBytes  int64 // the QEMU process's share of host memory; 0 when unknown
}

// MarshalJSON writes milliseconds and bytes.
func (s Stats) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		UptimeMS         float64 `json:"uptime_ms"`
		BootMS           float64 `json:"boot_ms"`
		CPUUsedPercent   float64 `json:"cpu_used_percent"`
		MemoryTotalBytes int64   `json:"memory_total_bytes"`
		MemoryUsedBytes  int64   `json:"memory_used_bytes"`
		DiskTotalBytes   int64   `json:"disk_total_bytes"`
		DiskUsedBytes    int64   `json:"disk_used_bytes"`
		Processes        int     `json:"processes"`
		AgentRSSBytes    int64   `json:"agent_rss_bytes"`
		MachinePSSBytes  int64   `json:"machine_pss_bytes"`
	}{
		milliseconds(s.Uptime), milliseconds(s.Boot), s.CPUUsedPercent,
		s.MemoryTotalBytes, s.MemoryUsedBytes, s.DiskTotalBytes, s.DiskUsedBytes,
		s.Processes, s.AgentRSSBytes, s.MachinePSSBytes,
	})
}

// Image is an immutable root disk.
type Image struct {
	Digest     string            `json:"digest"`
	Names      []string          `json:"names"`
	CreatedAt  time.Time         `json:"created_at,omitzero"`
	SizeBytes  int64             `json:"size_bytes"` // of the disk
	UsedBytes  int64             `json:"used_bytes"` // on the host
	Source     string            `json:"source"`
	User       string            `json:"user,omitempty"`
	Workdir    string            `json:"workdir,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	UsedBy     []string          `json:"used_by,omitempty"` // names of workspaces; only Image fills it
}

// Kernel is a guest kernel.
type Kernel struct {
	Name      string    `json:"name"`
	Release   string    `json:"release"`
	Digest    string    `json:"digest"`
	Source    string    `json:"source"`
	SizeBytes int64     `json:"size_bytes"`
	Default   bool      `json:"default"`
	CreatedAt time.Time `json:"created_at,omitzero"`
}

// Progress of something long. Total is 0 while it is unknown; Unit is "bytes",
// or "" for steps; Log is a line of output of the tool at work.
type Progress struct {
	Stage string
	Done  int64
	Total int64
	Unit  string
	Log   string
}

// Info says what daemon answers.
type Info struct {
	Version           string    `json:"version"`
	PID               int       `json:"pid"`
	StartedAt         time.Time `json:"started_at,omitzero"`
	Socket            string    `json:"socket"`
	DataDir           string    `json:"data_dir"`
	RunDir            string    `json:"run_dir"`
	ConfigFile        string    `json:"config_file,omitempty"`
	StorageDriver     string    `json:"storage_driver"`
	NetworkDriver     string    `json:"network_driver"`
	QEMUVersion       string    `json:"qemu_version"`
	Accelerator       string    `json:"accelerator"`
	DefaultImage      string    `json:"default_image"`
	DefaultKernel     string    `json:"default_kernel"`
	WorkspacesRunning int       `json:"workspaces_running"`
	WorkspacesTotal   int       `json:"workspaces_total"`
	WorkspacesMax     int       `json:"workspaces_max"`
}

// Verdict is what a check of the host came to.
type Verdict string

// The verdicts.
const (
	VerdictOK   Verdict = "ok"
	VerdictWarn Verdict = "warn" // it works, but less well
	VerdictFail Verdict = "fail" // something will not work
)

// Check is one thing about the host that was looked at.
type Check struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Next    string  `json:"next,omitempty"`
}
