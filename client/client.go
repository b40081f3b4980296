// Package client talks to an agentiso daemon over its Unix socket.
//
//	c, err := client.New(client.Options{})
//	ws, _, err := c.Create(ctx, client.CreateOptions{Image: "dev"})
//	defer c.Destroy(context.Background(), ws.ID)
//	code, err := c.Exec(ctx, ws.ID, []string{"python3", "-c", "print(1+1)"},
//		client.ExecOptions{Stdout: os.Stdout, Stderr: os.Stderr})
//
// A workspace is named by its name, its id, or an unambiguous prefix of its id
// wherever a parameter is called ref.
//
// Every error is an [*Error]: what failed, why, what to do next, and a [Kind]
// to branch on. A daemon that goes away ends every call with such an error at
// once. The caller bounds each call with its context; calls that stream end
// when it does.
//
// A Client holds no state but idle connections and may be used by many
// goroutines.
package client

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/api/filesystem/filesystemconnect"
	"github.com/agentiso/agentiso/api/process/processconnect"
)

// Options say which daemon to talk to.
type Options struct {
	// Socket is the path of the daemon's Unix socket; required.
	Socket string
}

// Client calls one daemon. Make it with [New]; Close it to give back its idle
// connections.
type Client struct {
	socket     string
	transport  *http.Transport
	http       *http.Client
	workspaces agentisov1connect.WorkspaceServiceClient
	images     agentisov1connect.ImageServiceClient
	kernels    agentisov1connect.KernelServiceClient
	system     agentisov1connect.SystemServiceClient
}

const (
	// baseURL is what requests are addressed to; the socket decides where
	// they go.
	baseURL = "http://agentiso"
	// dialTimeout bounds a connect to the socket: a daemon with a full backlog
	// does not accept.
	dialTimeout = 5 * time.Second
	// bufferSize is that of a connection in each direction. Copies move 256 KiB
	// at a time; fewer system calls matter more than memory here.
	bufferSize = 256 << 10
)

// New returns a client of the daemon at o.Socket. It does not connect yet.
func New(o Options) (*Client, error) {
	if o.Socket == "" {
		return nil, &Error{Kind: Invalid, Message: "no socket is given", Next: "Set Options.Socket to the daemon's socket."}
	}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", o.Socket)
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 8,
		IdleConnTimeout:     30 * time.Second,
		ReadBufferSize:      bufferSize,
		WriteBufferSize:     bufferSize,
	}
	c := &Client{socket: o.Socket, transport: t, http: &http.Client{Transport: t}}
	c.workspaces = agentisov1connect.NewWorkspaceServiceClient(c.http, baseURL, rpcOptions()...)
	c.images = agentisov1connect.NewImageServiceClient(c.http, baseURL, rpcOptions()...)
	c.kernels = agentisov1connect.NewKernelServiceClient(c.http, baseURL, rpcOptions()...)
	c.system = agentisov1connect.NewSystemServiceClient(c.http, baseURL, rpcOptions()...)
	return c, nil
}

// maxMessage bounds one message; those of the daemon and of agents have less
// than 1 MiB.
const maxMessage = 16 << 20

func rpcOptions() []connect.ClientOption {
	return []connect.ClientOption{
		connect.WithReadMaxBytes(maxMessage),
		connect.WithAcceptCompression("gzip", nil, nil), // a Unix socket is faster
	}
}

// Socket is the path that the client was made with.
func (c *Client) Socket() string { return c.socket }

// Close gives back idle connections. Calls under way are not disturbed.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// agentURL is where the agent of a workspace answers.
func agentURL(ref string) string {
	return baseURL + "/workspaces/" + url.PathEscape(ref) + "/agent"
}

// processes is the process service of a workspace.
func (c *Client) processes(ref string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(c.http, agentURL(ref), rpcOptions()...)
}

// filesystem is the file-system service of a workspace.
func (c *Client) filesystem(ref string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(c.http, agentURL(ref), rpcOptions()...)
}

// asUser names the user that a call to an agent is made as; "" is the
// workspace's default.
func asUser(h http.Header, user string) {
	if user != "" {
		r := http.Request{Header: h}
		r.SetBasicAuth(user, "")
	}
}
