"""Ask a SuperLink, SuperNode or SuperExec for its health, by gRPC; exits 0 if it serves.

python health.py 127.0.0.1:9099
"""

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

_LIMIT_S = 5


def main(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        try:
            status = HealthStub(channel).Check(HealthCheckRequest(), timeout=_LIMIT_S).status
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    print(HealthCheckResponse.ServingStatus.Name(status))
    return 0 if status == HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
