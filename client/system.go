package client

import (
	"context"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
)

// BuildKernel makes the lean kernel from the distribution's source and makes
// it the default; jobs is that of make, 0 for the number of cores.
func (c *Client) BuildKernel(ctx context.Context, jobs int, force bool, report func(Progress)) (*Kernel, error) {
	if jobs < 0 || jobs > 1024 {
		return nil, invalid("Give 1 to 1024, or 0 for the number of cores.", "%d parallel jobs are not possible", jobs)
	}
	stream, err := c.kernels.Build(ctx, connect.NewRequest(&agentisov1.BuildKernelRequest{Jobs: uint32(jobs), Force: force}))
	if err != nil {
		return nil, c.failed(ctx, "building the kernel", err)
	}
	var k *Kernel
	err = follow(stream, report, func(e *agentisov1.BuildKernelResponse) bool {
		if e.GetKernel() != nil {
			k = kernelIn(e.GetKernel())
		}
		return k != nil
	})
	if err != nil {
		return nil, c.failed(ctx, "building the kernel", err)
	}
	return k, nil
}

// FetchKernel downloads and unpacks the distribution's cloud kernel.
func (c *Client) FetchKernel(ctx context.Context, force bool, report func(Progress)) (*Kernel, error) {
	stream, err := c.kernels.Fetch(ctx, connect.NewRequest(&agentisov1.FetchKernelRequest{Force: force}))
	if err != nil {
		return nil, c.failed(ctx, "fetching the kernel", err)
	}
	var k *Kernel
	err = follow(stream, report, func(e *agentisov1.FetchKernelResponse) bool {
		if e.GetKernel() != nil {
			k = kernelIn(e.GetKernel())
		}
		return k != nil
	})
	if err != nil {
		return nil, c.failed(ctx, "fetching the kernel", err)
	}
	return k, nil
}

// Kernels returns all kernels.
func (c *Client) Kernels(ctx context.Context) ([]*Kernel, error) {
	res, err := c.kernels.List(ctx, connect.NewRequest(&agentisov1.ListKernelsRequest{}))
	if err != nil {
		return nil, c.failed(ctx, "listing kernels", err)
	}
	all := make([]*Kernel, 0, len(res.Msg.GetKernels()))
	for _, k := range res.Msg.GetKernels() {
		all = append(all, kernelIn(k))
	}
	return all, nil
}

// Info says what daemon answers, and how much it has to do.
func (c *Client) Info(ctx context.Context) (*Info, error) {
	res, err := c.system.Info(ctx, connect.NewRequest(&agentisov1.InfoRequest{}))
	if err != nil {
		return nil, c.failed(ctx, "asking the daemon who it is", err)
	}
	m := res.Msg
	return &Info{
		Version:           m.GetVersion(),
		PID:               int(m.GetPid()),
		StartedAt:         moment(m.GetStartTime()),
		Socket:            c.socket,
		DataDir:           m.GetDataDir(),
		RunDir:            m.GetRunDir(),
		ConfigFile:        m.GetConfigFile(),
		StorageDriver:     m.GetStorageDriver(),
		NetworkDriver:     m.GetNetworkDriver(),
		QEMUVersion:       m.GetQemuVersion(),
		Accelerator:       m.GetAccelerator(),
		DefaultImage:      m.GetDefaultImage(),
		DefaultKernel:     m.GetDefaultKernel(),
		WorkspacesRunning: int(m.GetWorkspacesRunning()),
		WorkspacesTotal:   int(m.GetWorkspacesTotal()),
		WorkspacesMax:     int(m.GetMaxWorkspaces()),
	}, nil
}

// Doctor checks the host as the daemon sees it; probe boots a guest under KVM
// even when a verdict is known from before.
func (c *Client) Doctor(ctx context.Context, probe bool) ([]Check, error) {
	res, err := c.system.Doctor(ctx, connect.NewRequest(&agentisov1.DoctorRequest{Probe: probe}))
	if err != nil {
		return nil, c.failed(ctx, "checking the host", err)
	}
	var all []Check
	for _, m := range res.Msg.GetChecks() {
		all = append(all, Check{Name: m.GetName(), Verdict: verdicts[m.GetVerdict()], Detail: m.GetDetail(), Next: m.GetNext()})
	}
	return all, nil
}

// Shutdown asks the daemon to end, and returns once it has understood. With
// stopMachines it shuts every guest down first; otherwise machines run on.
func (c *Client) Shutdown(ctx context.Context, stopMachines bool) error {
	_, err := c.system.Shutdown(ctx, connect.NewRequest(&agentisov1.ShutdownRequest{StopMachines: stopMachines}))
	return c.failed(ctx, "shutting down the daemon", err)
}
