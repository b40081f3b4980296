package client

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
)

var states = map[agentisov1.WorkspaceState]State{
	agentisov1.WorkspaceState_WORKSPACE_STATE_CREATING:   Creating,
	agentisov1.WorkspaceState_WORKSPACE_STATE_RUNNING:    Running,
	agentisov1.WorkspaceState_WORKSPACE_STATE_STOPPING:   Stopping,
	agentisov1.WorkspaceState_WORKSPACE_STATE_STOPPED:    Stopped,
	agentisov1.WorkspaceState_WORKSPACE_STATE_STARTING:   Starting,
	agentisov1.WorkspaceState_WORKSPACE_STATE_FAILED:     Failed,
	agentisov1.WorkspaceState_WORKSPACE_STATE_DESTROYING: Destroying,
}

func workspaceIn(m *agentisov1.Workspace) *Workspace {
	return &Workspace{
		ID:            m.GetId(),
		Name:          m.GetName(),
		State:         states[m.GetState()],
		Reason:        m.GetReason(),
		CreatedAt:     moment(m.GetCreateTime()),
		StartedAt:     moment(m.GetStartTime()),
		Image:         m.GetImage(),
		ImageDigest:   m.GetImageDigest(),
		Kernel:        m.GetKernel(),
		Init:          m.GetInit(),
		CPUs:          int(m.GetCpus()),
		MemoryMiB:     m.GetMemoryMib(),
		DiskBytes:     m.GetDiskBytes(),
		DiskUsedBytes: m.GetDiskUsedBytes(),
		Env:           m.GetEnvironment(),
		User:          m.GetUser(),
		Workdir:       m.GetWorkdir(),
		AllowInternet: m.GetAllowInternet(),
		Ephemeral:     m.GetEphemeral(),
		Hostname:      m.GetHostname(),
		Address:       m.GetAddress(),
		MAC:           m.GetMac(),
		MachinePID:    int(m.GetMachinePid()),
		Accelerator:   m.GetAccelerator(),
		Link:          m.GetLink(),
	}
}

func timingsIn(m *agentisov1.Timings) Timings {
	t := Timings{Start: m.GetStart(), Total: time.Duration(m.GetTotalNs())}
	for _, s := range m.GetSteps() {
		t.Steps = append(t.Steps, Step{Name: s.GetName(), Duration: time.Duration(s.GetDurationNs())})
	}
	return t
}

func imageIn(m *agentisov1.Image) *Image {
	i := &Image{
		Digest:     m.GetDigest(),
		Names:      m.GetNames(),
		CreatedAt:  moment(m.GetCreateTime()),
		SizeBytes:  m.GetSizeBytes(),
		UsedBytes:  m.GetUsedBytes(),
		Source:     m.GetSource(),
		User:       m.GetUser(),
		Workdir:    m.GetWorkdir(),
		Env:        m.GetEnvironment(),
		Entrypoint: m.GetEntrypoint(),
		Cmd:        m.GetCmd(),
	}
	if i.Names == nil {
		i.Names = []string{} // a list in JSON, too
	}
	return i
}

func kernelIn(m *agentisov1.Kernel) *Kernel {
	return &Kernel{
		Name:      m.GetName(),
		Release:   m.GetRelease(),
		Digest:    m.GetDigest(),
		Source:    m.GetSource(),
		SizeBytes: m.GetSizeBytes(),
		Default:   m.GetIsDefault(),
		CreatedAt: moment(m.GetCreateTime()),
	}
}

func progressIn(m *agentisov1.Progress) Progress {
	return Progress{Stage: m.GetStage(), Done: m.GetDone(), Total: m.GetTotal(), Unit: m.GetUnit(), Log: m.GetLog()}
}

var verdicts = map[agentisov1.Check_Verdict]Verdict{
	agentisov1.Check_VERDICT_OK:   VerdictOK,
	agentisov1.Check_VERDICT_WARN: VerdictWarn,
	agentisov1.Check_VERDICT_FAIL: VerdictFail,
}

// moment is zero for a time that is not set.
func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
