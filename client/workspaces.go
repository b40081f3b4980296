package client

import (
	"context"
	"math"
	"time"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
)

// CreateOptions say what a new workspace shall be; zero values mean the
// daemon's configured defaults.
type CreateOptions struct {
	Name          string // RFC 1123 label of at most 63 characters; "": one is made
	Image         string // name or digest
	Kernel        string
	Init          string // "fast" or "image"
	CPUs          int
	MemoryMiB     int64
	DiskBytes     int64
	Env           map[string]string // default environment of every process
	Workdir       string
	User          string
	AllowInternet bool
}

func (o CreateOptions) request() (*agentisov1.CreateRequest, error) {
	if o.CPUs < 0 || o.CPUs > math.MaxInt32 {
		return nil, invalid("Give a positive number, or none for the default.", "%d vCPUs are not possible", o.CPUs)
	}
	return &agentisov1.CreateRequest{
		Name:          o.Name,
		Image:         o.Image,
		Cpus:          uint32(o.CPUs),
		MemoryMib:     o.MemoryMiB,
		DiskBytes:     o.DiskBytes,
		Environment:   o.Env,
		Workdir:       o.Workdir,
		User:          o.User,
		AllowInternet: o.AllowInternet,
		Init:          o.Init,
		Kernel:        o.Kernel,
	}, nil
}

// Create makes a workspace and returns when its guest is ready for commands.
// On any error, the end of ctx included, nothing of it remains.
func (c *Client) Create(ctx context.Context, o CreateOptions) (*Workspace, Timings, error) {
	req, err := o.request()
	if err != nil {
		return nil, Timings{}, err
	}
	res, err := c.workspaces.Create(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, Timings{}, c.failed(ctx, "creating a workspace", err)
	}
	return workspaceIn(res.Msg.GetWorkspace()), timingsIn(res.Msg.GetTimings()), nil
}

// Held is a workspace that lives as long as its connection to the daemon.
type Held struct {
	*Workspace
	Timings Timings

	c      *Client
	cancel context.CancelFunc
	done   chan struct{}
}

// Hold makes a workspace that the daemon destroys when the caller calls
// Release, goes away (even by SIGKILL), or when the daemon itself ends. ctx
// bounds the creation only.
func (c *Client) Hold(ctx context.Context, o CreateOptions) (*Held, error) {
	req, err := o.request()
	if err != nil {
		return nil, err
	}
	hctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	giveUp := context.AfterFunc(ctx, cancel)
	stream, err := c.workspaces.Hold(hctx, connect.NewRequest(&agentisov1.HoldRequest{Create: req}))
	if err != nil {
		cancel()
		return nil, c.failed(ctx, "creating a workspace", err)
	}
	ok := stream.Receive()
	if !ok || !giveUp() {
		cancel()
		err := stream.Err()
		if err == nil {
			err = context.Cause(ctx)
		}
		_ = stream.Close()
		return nil, c.failed(ctx, "creating a workspace", err)
	}
	h := &Held{
		Workspace: workspaceIn(stream.Msg().GetWorkspace()), Timings: timingsIn(stream.Msg().GetTimings()),
		c: c, cancel: cancel, done: make(chan struct{}),
	}
	go func() { // ends with Release, or when the daemon ends the stream
		defer close(h.done)
		for stream.Receive() {
		}
		_ = stream.Close()
	}()
	return h, nil
}

// Lost is closed when the hold has ended: after Release, or because the daemon
// went away.
func (h *Held) Lost() <-chan struct{} { return h.done }

// Release destroys the workspace and returns when it is gone. If ctx ends
// first, the daemon goes on destroying it.
func (h *Held) Release(ctx context.Context) error {
	_, err := h.c.Destroy(ctx, h.ID)
	h.cancel()
	<-h.done
	if KindOf(err) == NotFound {
		return nil
	}
	return err
}

// Get returns one workspace.
func (c *Client) Get(ctx context.Context, ref string) (*Workspace, error) {
	res, err := c.workspaces.Get(ctx, connect.NewRequest(&agentisov1.GetRequest{Ref: ref}))
	if err != nil {
		return nil, c.failed(ctx, "looking up workspace "+ref, err)
	}
	return workspaceIn(res.Msg.GetWorkspace()), nil
}

// List returns all workspaces, oldest first.
func (c *Client) List(ctx context.Context) ([]*Workspace, error) {
	res, err := c.workspaces.List(ctx, connect.NewRequest(&agentisov1.ListRequest{}))
	if err != nil {
		return nil, c.failed(ctx, "listing workspaces", err)
	}
	all := make([]*Workspace, 0, len(res.Msg.GetWorkspaces()))
	for _, w := range res.Msg.GetWorkspaces() {
		all = append(all, workspaceIn(w))
	}
	return all, nil
}

// Start boots a stopped or failed workspace and returns when it is ready.
func (c *Client) Start(ctx context.Context, ref string) (*Workspace, Timings, error) {
	res, err := c.workspaces.Start(ctx, connect.NewRequest(&agentisov1.StartRequest{Ref: ref}))
	if err != nil {
		return nil, Timings{}, c.failed(ctx, "starting workspace "+ref, err)
	}
	return workspaceIn(res.Msg.GetWorkspace()), timingsIn(res.Msg.GetTimings()), nil
}

// Stop shuts the guest down and keeps its disk; with force it is not asked,
// as if the plug were pulled.
func (c *Client) Stop(ctx context.Context, ref string, force bool) (*Workspace, error) {
	res, err := c.workspaces.Stop(ctx, connect.NewRequest(&agentisov1.StopRequest{Ref: ref, Force: force}))
	if err != nil {
		return nil, c.failed(ctx, "stopping workspace "+ref, err)
	}
	return workspaceIn(res.Msg.GetWorkspace()), nil
}

// Destroy removes a workspace and everything that it owns, in whatever state
// it is, and returns its id.
func (c *Client) Destroy(ctx context.Context, ref string) (id string, err error) {
	res, err := c.workspaces.Destroy(ctx, connect.NewRequest(&agentisov1.DestroyRequest{Ref: ref}))
	if err != nil {
		return "", c.failed(ctx, "destroying workspace "+ref, err)
	}
	return res.Msg.GetId(), nil
}

// Rename gives a workspace another name.
func (c *Client) Rename(ctx context.Context, ref, name string) (*Workspace, error) {
	res, err := c.workspaces.Rename(ctx, connect.NewRequest(&agentisov1.RenameRequest{Ref: ref, Name: name}))
	if err != nil {
		return nil, c.failed(ctx, "renaming workspace "+ref, err)
	}
	return workspaceIn(res.Msg.GetWorkspace()), nil
}

// LogsOptions say how much of a console to read.
type LogsOptions struct {
	Follow    bool  // go on with what comes, until ctx or the machine ends
	TailBytes int64 // how much of the past; 0: all that is kept
}

// Logs calls fn with what the workspace's console printed, piece by piece. An
// error of fn ends it and is returned. With Follow it returns nil when the
// console ends.
func (c *Client) Logs(ctx context.Context, ref string, o LogsOptions, fn func([]byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.workspaces.Logs(ctx, connect.NewRequest(&agentisov1.LogsRequest{Ref: ref, Follow: o.Follow, TailBytes: o.TailBytes}))
	if err != nil {
		return c.failed(ctx, "reading the console of "+ref, err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := fn(stream.Msg().GetData()); err != nil {
			cancel() // Close would read the rest
			return err
		}
	}
	return c.failed(ctx, "reading the console of "+ref, stream.Err())
}

// Stats asks the guest of a running workspace what it uses.
func (c *Client) Stats(ctx context.Context, ref string) (*Stats, error) {
	res, err := c.workspaces.Stats(ctx, connect.NewRequest(&agentisov1.StatsRequest{Ref: ref}))
	if err != nil {
		return nil, c.failed(ctx, "reading statistics of "+ref, err)
	}
	m := res.Msg
	return &Stats{
		Uptime:           time.Duration(m.GetUptimeNs()),
		Boot:             time.Duration(m.GetBootNs()),
		CPUUsedPercent:   m.GetCpuUsedPercent(),
		MemoryTotalBytes: m.GetMemoryTotalBytes(),
		MemoryUsedBytes:  m.GetMemoryUsedBytes(),
		DiskTotalBytes:   m.GetDiskTotalBytes(),
		DiskUsedBytes:    m.GetDiskUsedBytes(),
		Processes:        int(m.GetProcesses()),
		AgentRSSBytes:    m.GetAgentRssBytes(),
		MachinePSSBytes:  m.GetMachinePssBytes(),
	}, nil
}
